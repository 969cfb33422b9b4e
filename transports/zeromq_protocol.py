"""The messages of a connection over ZeroMQ, and how much each end may send; no I/O here.

ZeroMQ delivers messages but knows no connections, no end of one, and cannot slow down one peer
of a ROUTER. So each message starts with a byte that says what it is (numbers little endian):

    client -> listener   OPEN     protocol name
    listener -> client   ACCEPT   token (16 bytes), window (u64)
    client -> listener   CONFIRM  token, window: only now does the listener run its handler
    both ways            DATA     a whole frame
                         BEGIN    length of a frame (u64), its first piece
                         PIECE    the next piece of it, until it is whole
                         CREDIT   transit charge received (u64), window charge taken (u64)
                         END      no more frames; answered with ENDED
                         ENDED    everything up to your END has arrived
                         ABORT    the connection is over

Two bounds hold for what is sent. *Window*: the receiver's ``max_queued_nbytes``. Each frame is
charged its length and an overhead when it starts, which is given back when it is taken; a frame
may start while less than the window is charged, so one of any size always may. *Transit*: each
message is charged its length and an overhead, given back when it arrives, so that little lies
in ZeroMQ's own queues. Both count from the start of the connection and never go back.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator

from privatelora.errors import RemoteProtocolError
from privatelora.transports.base import Buffer, Limits
from privatelora.transports.framing import oversized

OPEN, ACCEPT, CONFIRM, DATA, BEGIN, PIECE, CREDIT, END, ENDED, ABORT = range(1, 11)

OPEN_MESSAGE = bytes([OPEN]) + b"PLZ1"
END_MESSAGE = bytes([END])
ENDED_MESSAGE = bytes([ENDED])
ABORT_MESSAGE = bytes([ABORT])

TOKEN_NBYTES = 16
PIECE_NBYTES = 128 * 1024
"""A larger frame goes in pieces of this size."""
MAX_MESSAGE_NBYTES = PIECE_NBYTES + 64
"""What ZeroMQ has to let in: type and length before a piece, and 33 bytes that CURVE adds."""
TRANSIT_NBYTES = 4 * 2**20
"""Most that may be on its way. More would cost memory, less would slow down far peers."""
FRAME_OVERHEAD_NBYTES = 256
"""Charged to the window per frame, about what the objects that hold one take."""
MESSAGE_OVERHEAD_NBYTES = 16 * 1024
"""Charged to the transit per message, which bounds their number."""
MAX_MESSAGES_IN_TRANSIT = TRANSIT_NBYTES // MESSAGE_OVERHEAD_NBYTES + 1

_CURVE_NBYTES = 33  # ZMTP 3.1 section 3.3: command name, nonce, authenticator, flags

_GREETING = struct.Struct(f"<B{TOKEN_NBYTES}sQ")
_BEGIN = struct.Struct("<BQ")
_CREDIT = struct.Struct("<BQQ")
_DATA_BYTE = bytes([DATA])
_PIECE_BYTE = bytes([PIECE])


def wire_nbytes(message_nbytes: int, *, curve: bool) -> int:
    """Bytes that a message takes on the wire (ZMTP 3.1: flags and a length of 1 or 8 bytes)."""
    nbytes = message_nbytes + _CURVE_NBYTES * curve
    return nbytes + (2 if nbytes <= 255 else 9)


def greeting(kind: int, token: bytes, window_nbytes: int) -> bytes:
    """An ACCEPT or CONFIRM message."""
    return _GREETING.pack(kind, token, window_nbytes)


def parse_greeting(message: memoryview, kind: int, peer: str) -> tuple[bytes, int]:
    """Token and window of the ACCEPT or CONFIRM that has to come now.

    Raises RemoteProtocolError for any other message.
    """
    if len(message) == _GREETING.size:
        found, token, window_nbytes = _GREETING.unpack(message)
        if found == kind and window_nbytes > 0:
            return token, window_nbytes
    raise RemoteProtocolError(
        f"{peer} does not open a PrivateLoRA connection (found {bytes(message[:16])!r}); "
        "check that both ends are PrivateLoRA of the same version"
    )


def data_message(parts: tuple[Buffer, ...]) -> bytes:
    """The message for a frame of at most PIECE_NBYTES."""
    return b"".join((_DATA_BYTE, *parts))


def data_messages(parts: tuple[Buffer, ...], nbytes: int) -> Iterator[bytes]:
    """The messages for a frame of ``nbytes`` bytes, each made when it is asked for."""
    if nbytes <= PIECE_NBYTES:
        yield data_message(parts)
        return
    views = (memoryview(part) for part in parts)
    rest = deque(view.cast("B") for view in views if view.nbytes)
    head = _BEGIN.pack(BEGIN, nbytes)
    while rest:
        piece: list[bytes | memoryview] = [head]
        room = PIECE_NBYTES
        while rest and room:
            view = rest.popleft()
            if len(view) > room:
                rest.appendleft(view[room:])
                view = view[:room]
            piece.append(view)
            room -= len(view)
        yield b"".join(piece)
        head = _PIECE_BYTE


class Outgoing:
    """What this end may still send. ``window_nbytes``: the peer's."""

    __slots__ = ("_peer", "_received", "_sent", "_started", "_taken", "_window_nbytes")

    def __init__(self, peer: str, window_nbytes: int) -> None:
        self._peer = peer
        self._window_nbytes = window_nbytes
        self._started = self._taken = 0
        self._sent = self._received = 0

    def may_start(self) -> bool:
        """Whether the first message of a frame may be sent."""
        return self._started - self._taken < self._window_nbytes and self.may_go_on()

    def may_go_on(self) -> bool:
        """Whether a further message of a frame may be sent."""
        return self._sent - self._received < TRANSIT_NBYTES

    def start(self, frame_nbytes: int) -> None:
        """Note that a frame of that length is started."""
        self._started += frame_nbytes + FRAME_OVERHEAD_NBYTES

    def send(self, message_nbytes: int) -> None:
        """Note that a message of that length is sent."""
        self._sent += message_nbytes + MESSAGE_OVERHEAD_NBYTES

    def credit(self, message: memoryview) -> None:
        """Note what a CREDIT message gives back. Raises RemoteProtocolError if it cannot be."""
        if len(message) == _CREDIT.size:
            _, received, taken = _CREDIT.unpack(message)
            if self._received <= received <= self._sent and self._taken <= taken <= self._started:
                self._received, self._taken = received, taken
                return
        raise RemoteProtocolError(f"{self._peer} sent a credit that cannot be; it has a defect")


class Incoming:
    """Puts frames together and says what the peer may send further."""

    __slots__ = (
        "_frame",
        "_frame_nbytes",
        "_limits",
        "_peer",
        "_received",
        "_received_told",
        "_started",
        "_taken",
        "_taken_told",
    )

    def __init__(self, peer: str, limits: Limits) -> None:
        self._peer = peer
        self._limits = limits
        self._frame: bytearray | None = None
        self._frame_nbytes = 0
        self._received = self._received_told = 0
        self._started = self._taken = self._taken_told = 0

    @property
    def in_frame(self) -> bool:
        """Whether pieces of a frame are still to come."""
        return self._frame is not None

    def add(self, message: memoryview) -> memoryview | None:
        """Take in a DATA, BEGIN or PIECE message; return the frame that is now whole.

        Raises RemoteProtocolError for a message out of turn, a frame above the limit (before
        anything is allocated for it), and one that the peer had no credit for.
        """
        kind, frame = message[0], self._frame
        if (kind == PIECE) is (frame is None):
            raise RemoteProtocolError(f"{self._peer} mixed up the pieces of frames")
        self._received += len(message) + MESSAGE_OVERHEAD_NBYTES
        if frame is not None:
            return self._fill(frame, message[1:])
        if kind == DATA:
            self._start(len(message) - 1)
            return memoryview(bytearray(message[1:]))
        if len(message) < _BEGIN.size:
            raise RemoteProtocolError(f"{self._peer} cut off the length of a frame")
        _, nbytes = _BEGIN.unpack_from(message)
        self._start(nbytes)
        # Grows as pieces arrive: what a peer only declares takes no memory.
        self._frame, self._frame_nbytes = bytearray(), nbytes
        return self._fill(self._frame, message[_BEGIN.size :])

    def take(self, frame_nbytes: int) -> None:
        """Note that a frame of that length has left the queue."""
        self._taken += frame_nbytes + FRAME_OVERHEAD_NBYTES

    def take_all(self) -> None:
        """Note that the queue was emptied."""
        self._taken = self._started
        if self._frame is not None:
            self._taken -= self._frame_nbytes + FRAME_OVERHEAD_NBYTES

    def credit_due(self) -> bool:
        """Whether the peer should hear what it may send; it is told before it has to wait."""
        return (
            self._received - self._received_told >= TRANSIT_NBYTES // 4
            or (self._taken - self._taken_told) * 2 >= self._limits.max_queued_nbytes
        )

    def credit(self) -> bytes:
        """The CREDIT message to send now."""
        self._received_told, self._taken_told = self._received, self._taken
        return _CREDIT.pack(CREDIT, self._received, self._taken)

    def _start(self, nbytes: int) -> None:
        if nbytes > self._limits.max_frame_nbytes:
            raise oversized(nbytes, self._limits.max_frame_nbytes, self._peer)
        if self._started - self._taken_told >= self._limits.max_queued_nbytes:
            raise RemoteProtocolError(
                f"{self._peer} sends more than this end has room for, ignoring its credit; "
                "check that both ends are PrivateLoRA of the same version"
            )
        self._started += nbytes + FRAME_OVERHEAD_NBYTES

    def _fill(self, frame: bytearray, piece: memoryview) -> memoryview | None:
        if not piece or len(frame) + len(piece) > self._frame_nbytes:
            raise RemoteProtocolError(f"{self._peer} sent a piece that does not fit its frame")
        frame += piece
        if len(frame) < self._frame_nbytes:
            return None
        self._frame = None
        return memoryview(frame)
