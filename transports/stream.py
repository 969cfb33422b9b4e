"""A connection over any byte stream: frames cut from and written to it without waiting.

The hot path of decoding: a step makes some thirty round trips of frames below a kilobyte.
Both directions therefore try the stream directly and use the event loop only to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from privatelora.errors import ConnectionClosed, RemoteProtocolError
from privatelora.transports.base import Buffer, Limits
from privatelora.transports.connection import QueuedConnection
from privatelora.transports.flow import AdaptiveSpin, again, wake
from privatelora.transports.framing import HEADER, HEADER_NBYTES, MAGIC, FrameReader, frame_nbytes

_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
_DISCARD_NBYTES = 64 * 1024
_MAX_DISCARDS = 16
"""Reads per event while discarding, so that a flood cannot hold the loop."""


class ByteStream(Protocol):
    """One end of a full-duplex stream of bytes, like a non-blocking socket.

    Where a call cannot go on without waiting it raises BlockingIOError; where the stream is
    lost, another OSError; where the peer broke the stream's own rules, RemoteProtocolError.
    """

    peer: str
    """Address of the other end, for messages to people."""
    identity: str | None
    """See Connection.identity."""

    def recv_into(self, buffer: memoryview | bytearray, /) -> int:
        """Read what is there into ``buffer``; 0 when the peer has ended its direction."""

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        """Write the start of ``buffers`` and return how many bytes that was.

        After a BlockingIOError the next call brings the same bytes.
        """

    def start_reading(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` from the event loop whenever there is something to read.

        That may be while nothing is there. Replaces the callback given before.
        """

    def stop_reading(self) -> None:
        """End what ``start_reading`` began. May be repeated."""

    async def wait_writable(self, waiter: asyncio.Future[None]) -> None:
        """Wait until ``sendmsg`` is worth another try, or ``waiter`` is resolved otherwise."""

    def end_sending(self) -> None:
        """End this direction: the peer reads what was written, then 0.

        From now on ``recv_into`` is called only to find the peer's end.
        """

    def close(self, *, reset: bool) -> None:
        """Give everything back. ``reset``: drop undelivered data and let the peer notice."""


class StreamConnection(QueuedConnection):
    """Frames over a byte stream, which it owns. ``spin_s``: see Limits; never None here."""

    def __init__(self, stream: ByteStream, limits: Limits, spin_s: float) -> None:
        super().__init__(stream.peer, limits)
        self._stream = stream
        self._reader = FrameReader(self._queue, limits.max_frame_nbytes, self._peer)
        self._spin = AdaptiveSpin(spin_s) if spin_s else None
        self._is_reading = True
        stream.start_reading(self._on_readable)
        self._write_waiter: asyncio.Future[None] | None = None

    @property
    def identity(self) -> str | None:
        """What the peer has proven to be; see Connection.identity."""
        return self._stream.identity

    async def send(self, *parts: Buffer) -> None:
        """Send one frame; see Connection.send."""
        nbytes = frame_nbytes(parts, self._limits.max_frame_nbytes)
        if self._refusal is not None:
            raise again(self._refusal)
        if len(parts) >= _MAX_BUFFERS:
            parts = (b"".join(parts),)
        buffers = (HEADER.pack(MAGIC, nbytes), *parts)
        nbytes += HEADER_NBYTES
        # Not awaited, so that the bytes leave even if the loop computes next.
        num_written = 0 if self._turns.num_tasks else self._write(buffers)
        if num_written < nbytes:
            await self._write_rest(buffers, num_written)
        counters = self.counters
        counters.sent_nbytes += nbytes
        counters.sent_frames += 1

    def _write(self, buffers: Sequence[Buffer]) -> int:
        try:
            return self._stream.sendmsg(buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            # Only this direction: what the peer said before it left can still be received.
            closed = self._lost(error)
            self._refusal = self._broken = closed
            raise again(closed) from error
        except RemoteProtocolError as error:
            # The receiver gets the error itself.
            self._fail(error)
            raise ConnectionClosed(f"the connection was aborted: {error}") from error

    async def _write_rest(self, buffers: Sequence[Buffer], num_written: int) -> None:
        # Without empty ones: a memoryview with a zero in its shape cannot be cast.
        views = [view.cast("B") for part in buffers if (view := memoryview(part)).nbytes]
        rest = _after(num_written, views)
        in_frame = num_written > 0
        try:
            async with self._turns:
                while rest:
                    self._raise_if_broken()
                    num_written = self._write(rest)
                    if num_written:
                        in_frame = True
                        rest = _after(num_written, rest)
                    else:
                        self._write_waiter = self._loop.create_future()
                        await self._stream.wait_writable(self._write_waiter)
        except asyncio.CancelledError:
            if in_frame:
                self.abort()
            raise

    async def recv(self) -> memoryview:
        """Return the next frame; see Connection.recv."""
        queue = self._queue
        queue.require_no_receiver()
        if not queue.frames and queue.error is None:
            self._receive()
            if self._spin is not None and not queue.frames:
                self._spin.until(self._has_input)
        if queue.frames:
            return queue.pop()
        return await queue.get()

    def _has_input(self) -> bool:
        """Look into the stream for a frame or the end."""
        if not super()._has_input():
            self._receive()
        return super()._has_input()

    def _on_readable(self) -> None:
        if self._queue.full:
            self._stream.stop_reading()
            self._is_reading = False
        else:
            self._receive()

    def _receive(self) -> None:
        """Read until a frame is whole or the stream is empty.

        Not less, because uvloop reports a socket in error once only: what is not read then
        would not be announced again.
        """
        reader, counters = self._reader, self.counters
        while True:
            try:
                nbytes = self._stream.recv_into(reader.free)
            except BlockingIOError:
                return
            except OSError as error:
                self._end_receiving(self._lost(error))
                return
            except RemoteProtocolError as error:
                self._fail(error)
                return
            if not nbytes:
                self._end_receiving(self._closed_by_peer())
                return
            counters.received_nbytes += nbytes
            try:
                num_frames = reader.advance(nbytes)
            except RemoteProtocolError as error:
                self._fail(error)
                return
            if num_frames:
                counters.received_frames += num_frames
                return

    def _room_made(self) -> None:
        if self._queue.error is not None:
            return
        try:
            self.counters.received_frames += self._reader.cut()
        except RemoteProtocolError as error:
            self._fail(error)
            return
        if not self._is_reading and not self._queue.full:
            self._is_reading = True
            self._stream.start_reading(self._on_readable)

    def _end_receiving(self, error: ConnectionClosed) -> None:
        self._stream.stop_reading()
        self._queue.end(error)
        self._peer_ended.set()

    def _discard_incoming(self) -> None:
        if self._peer_ended.is_set():
            return
        self._stream.start_reading(partial(self._discard, bytearray(_DISCARD_NBYTES)))

    def _discard(self, buffer: bytearray) -> None:
        try:
            for _ in range(_MAX_DISCARDS):
                if not self._stream.recv_into(buffer):
                    break
            else:
                return
        except BlockingIOError:
            return
        except (OSError, RemoteProtocolError):
            # The peer has left without reading everything: nothing to wait for either.
            pass
        self._stream.stop_reading()
        self._peer_ended.set()

    def _end_sending(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.end_sending()

    def _release(self, *, reset: bool) -> None:
        self._stream.close(reset=reset)
        # At once: a connection is part of cycles, so it may stay until a full collection.
        self._reader.release()
        wake(self._write_waiter)

    def _closed_by_peer(self) -> ConnectionClosed:
        if self._reader.in_frame:
            return ConnectionClosed(f"{self._peer} closed the connection and cut off a frame")
        return ConnectionClosed(f"{self._peer} closed the connection")

    def _lost(self, error: OSError) -> ConnectionClosed:
        closed = ConnectionClosed(f"the connection to {self._peer} was lost: {error.strerror}")
        # The traceback would keep this connection alive in a cycle.
        closed.__cause__ = error.with_traceback(None)
        return closed


def _after(nbytes: int, buffers: list[memoryview]) -> list[memoryview]:
    """What is left of ``buffers`` behind their first ``nbytes`` bytes."""
    for index, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[index + 1 :]]
        nbytes -= len(buffer)
    return []
