"""Frames in a byte stream: an 8-byte header (magic, payload length), then the payload.

No I/O here: a stream transport reads into ``FrameReader.free`` and says how much came.
"""

from __future__ import annotations

import struct

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.transports.base import Buffer
from privatelora.transports.flow import FrameQueue

HEADER = struct.Struct("<4sI")
"""Little endian: the magic, then the payload length in bytes (u32)."""

HEADER_NBYTES = HEADER.size
MAGIC = b"PLR1"

_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")
"""How an alert and a handshake begin, from a peer that takes this end for a TLS one."""
_FIRST_BUFFER_NBYTES = 2 * 1024
"""Enough for a peer that decodes; most connections of an attack never fill more."""
_BUFFER_NBYTES = 64 * 1024
_SMALL_FRAME_NBYTES = 16 * 1024
"""A larger frame that has not arrived whole is read into memory of its own."""
_FIRST_LARGE_NBYTES = 32 * 1024
"""Memory that such a frame gets at once. It grows as bytes arrive: what a peer only declares
takes neither memory nor the time to clear it."""
_GROWTH = 4
_ZEROS = bytes(2**20)


def frame_nbytes(parts: tuple[Buffer, ...], max_frame_nbytes: int) -> int:
    """Payload length of a frame of ``parts``.

    Raises LocalProtocolError above the limit or for a memoryview with gaps.
    """
    nbytes = 0
    for part in parts:
        if isinstance(part, memoryview):
            if not part.c_contiguous:
                raise LocalProtocolError("a frame cannot be made of strided memory; copy it first")
            nbytes += part.nbytes
        else:
            nbytes += len(part)
    if nbytes > max_frame_nbytes:
        raise LocalProtocolError(
            f"a frame of {nbytes} bytes is over this end's limit of {max_frame_nbytes}; "
            "send less at once or raise max_frame_nbytes on both ends"
        )
    return nbytes


def oversized(nbytes: int, max_frame_nbytes: int, peer: str) -> RemoteProtocolError:
    """The error for an incoming frame above the limit."""
    return RemoteProtocolError(
        f"{peer} sent a frame of {nbytes} bytes, over this end's limit of {max_frame_nbytes}; "
        "raise the limit here or let the peer send less at once"
    )


class FrameReader:
    """Cuts received bytes into frames and puts them into a queue.

    ``free``: where the next bytes of the stream belong; never empty while the queue is not
    full. A small frame is copied once, out of the shared buffer; a large one is received
    where it stays. Stops cutting while the queue is full. An unfinished frame takes at most
    four times the memory that its bytes so far do, or a little.
    """

    __slots__ = (
        "_buffer",
        "_end",
        "_large",
        "_large_nbytes",
        "_max_frame_nbytes",
        "_num_filled",
        "_peer",
        "_queue",
        "_start",
        "_view",
        "free",
    )

    def __init__(self, queue: FrameQueue, max_frame_nbytes: int, peer: str) -> None:
        self._queue = queue
        self._max_frame_nbytes = max_frame_nbytes
        self._peer = peer
        self._buffer = bytearray(_FIRST_BUFFER_NBYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._large: bytearray | None = None
        self._large_nbytes = self._num_filled = 0
        self.free = self._view

    @property
    def in_frame(self) -> bool:
        """Whether the bytes so far end inside a frame."""
        return self._end > self._start or self._large is not None

    def advance(self, nbytes: int) -> int:
        """Note that ``nbytes`` were written to the start of ``free``; see ``cut``."""
        if self._large is None:
            self._end += nbytes
            return self.cut()
        self._num_filled += nbytes
        if self._num_filled < self._large_nbytes:
            if nbytes < len(self.free):
                self.free = self.free[nbytes:]
            else:
                self._grow_large(self._large)
            return 0
        self._queue.put(memoryview(self._large))
        self._large = None
        self.free = self._view
        return 1

    def release(self) -> None:
        """Give back the memory; nothing may be received any more."""
        self._large = None
        self._buffer = bytearray()
        self.free = self._view = memoryview(self._buffer)

    def cut(self) -> int:
        """Move whole frames to the queue until it is full; return how many.

        Raises RemoteProtocolError if the next bytes are no header or declare a frame above
        the limit, before anything is allocated for it.
        """
        start, end, num_frames = self._start, self._end, 0
        buffer, queue = self._buffer, self._queue
        while end - start >= HEADER_NBYTES and not queue.full:
            magic, nbytes = HEADER.unpack_from(buffer, start)
            if magic != MAGIC:
                raise self._not_a_frame(start)
            if nbytes > self._max_frame_nbytes:
                raise oversized(nbytes, self._max_frame_nbytes, self._peer)
            payload = start + HEADER_NBYTES
            stop = payload + nbytes
            if stop > end:
                if nbytes > _SMALL_FRAME_NBYTES:
                    self._begin_large(nbytes, buffer[payload:end])
                    return num_frames
                break
            queue.put(memoryview(buffer[payload:stop]))
            num_frames += 1
            start = stop
        if start == end:
            self._start = self._end = 0
            self.free = self._view
        elif queue.full:
            self._start = start
        else:
            self._keep_rest(start)
        return num_frames

    def _keep_rest(self, start: int) -> None:
        buffer, nbytes = self._buffer, self._end - start
        if not MAGIC.startswith(buffer[start : start + min(nbytes, len(MAGIC))]):
            raise self._not_a_frame(start)
        if self._end == len(buffer) < _BUFFER_NBYTES:
            self._buffer = bytearray(_BUFFER_NBYTES)
            self._view = memoryview(self._buffer)
        if start or buffer is not self._buffer:
            self._view[:nbytes] = buffer[start : self._end]
        self._start, self._end = 0, nbytes
        self.free = self._view[nbytes:]

    def _begin_large(self, nbytes: int, head: bytearray) -> None:
        self._large, self._large_nbytes = head, nbytes
        self._num_filled = len(head)
        self._start = self._end = 0
        self._grow_large(head)

    def _grow_large(self, large: bytearray) -> None:
        """Make room in proportion to what has arrived, within what was declared."""
        self.free = self._view  # memory that a view shows cannot grow
        room = min(self._large_nbytes, max(_GROWTH * len(large), _FIRST_LARGE_NBYTES))
        while len(large) < room:
            large += _ZEROS[: room - len(large)]
        self.free = memoryview(large)[self._num_filled :]

    def _not_a_frame(self, start: int) -> RemoteProtocolError:
        found = bytes(self._buffer[start : min(start + 16, self._end)])
        hint = "check that the address and port belong to a PrivateLoRA peer of this version"
        if found.startswith(_TLS_RECORDS):
            hint = "it speaks TLS: use tls:// on both ends or on neither"
        return RemoteProtocolError(
            f"{self._peer} does not send PrivateLoRA frames (found {found!r}, expected {MAGIC!r}); "
            f"{hint}"
        )
