"""``tcp://host:port``: frames over one TCP connection.

The hot path of decoding: a step makes some thirty round trips of frames below a kilobyte.
Both directions therefore try the socket directly and use the event loop only to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence

from privatelora.errors import ConnectError, ConnectionClosed, RemoteProtocolError
from privatelora.transports.address import parse_address
from privatelora.transports.base import (
    Buffer,
    Connection,
    Credentials,
    Handler,
    Limits,
    Listener,
    Transport,
)
from privatelora.transports.connection import QueuedConnection
from privatelora.transports.flow import AdaptiveSpin, again, wake
from privatelora.transports.framing import HEADER, HEADER_NBYTES, MAGIC, FrameReader, frame_nbytes
from privatelora.transports.handlers import HandlerTasks
from privatelora.transports.sockets import (
    AcceptLoop,
    close_with_reset,
    contact_text,
    endpoint_text,
    open_connection,
    open_listeners,
    wait_writable,
)

_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
_DISCARD_NBYTES = 64 * 1024
_MAX_DISCARDS = 16
"""Reads per event while discarding, so that a flood cannot hold the loop."""


class TcpConnection(QueuedConnection):
    """Frames over a connected, configured socket, which it owns.

    Raises OSError if the peer is already gone.
    """

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        super().__init__(endpoint_text("tcp", sock.getpeername()), limits)
        self._sock = sock
        self._fd = sock.fileno()
        self._reader = FrameReader(self._queue, limits.max_frame_nbytes, self._peer)
        self._spin = AdaptiveSpin(limits.spin_s) if limits.spin_s else None
        self._is_reading = True
        self._loop.add_reader(self._fd, self._on_readable)
        self._write_waiter: asyncio.Future[None] | None = None

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
            return self._sock.sendmsg(buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            # Only this direction: what the peer said before it left can still be received.
            closed = self._lost(error)
            self._refusal = self._broken = closed
            raise again(closed) from error

    async def _write_rest(self, buffers: Sequence[Buffer], num_written: int) -> None:
        rest = _after(num_written, [memoryview(part).cast("B") for part in buffers])
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
                        await wait_writable(self._loop, self._sock, self._write_waiter)
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
        """Whether a frame or the end is there to be taken."""
        queue = self._queue
        if not queue.frames and queue.error is None:
            self._receive()
        return bool(queue.frames) or queue.error is not None

    def _on_readable(self) -> None:
        if self._queue.full:
            self._loop.remove_reader(self._fd)
            self._is_reading = False
        else:
            self._receive()

    def _receive(self) -> None:
        """Read until a frame is whole or the socket is empty.

        Not less, because uvloop reports a socket in error once only: what is not read then
        would not be announced again.
        """
        reader, counters = self._reader, self.counters
        while True:
            try:
                nbytes = self._sock.recv_into(reader.free)
            except BlockingIOError:
                return
            except OSError as error:
                self._end_receiving(self._lost(error))
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
            self._loop.add_reader(self._fd, self._on_readable)

    def _end_receiving(self, error: ConnectionClosed) -> None:
        self._loop.remove_reader(self._fd)
        self._queue.end(error)
        self._peer_ended.set()

    def _discard_incoming(self) -> None:
        if self._peer_ended.is_set():
            return
        self._loop.remove_reader(self._fd)
        self._loop.add_reader(self._fd, self._discard, bytearray(_DISCARD_NBYTES))

    def _discard(self, buffer: bytearray) -> None:
        try:
            for _ in range(_MAX_DISCARDS):
                if not self._sock.recv_into(buffer):
                    break
            else:
                return
        except BlockingIOError:
            return
        except OSError:
            # The peer has left without reading everything: nothing to wait for either.
            pass
        self._loop.remove_reader(self._fd)
        self._peer_ended.set()

    def _end_sending(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def _release(self, *, reset: bool) -> None:
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        if reset:
            close_with_reset(self._sock)
        else:
            self._sock.close()
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


class TcpListener(Listener):
    """Accepts TCP connections on sockets that listen already, which it owns."""

    def __init__(
        self, address: str, sockets: Sequence[socket.socket], handler: Handler, limits: Limits
    ) -> None:
        self._address = address
        self._limits = limits
        self._handlers = HandlerTasks(handler, address)
        self._accept_loop = AcceptLoop(sockets, self._accepted)

    @property
    def address(self) -> str:
        """Contact address; of a wildcard, the one that works on this machine."""
        return self._address

    def _accepted(self, sock: socket.socket) -> None:
        self._handlers.start(TcpConnection(sock, self._limits))

    async def aclose(self) -> None:
        """Stop accepting, cancel the handlers and wait for them."""
        self._accept_loop.close()
        await self._handlers.aclose()


class TcpTransport(Transport):
    """``tcp://host:port``."""

    async def connect(self, address: str, limits: Limits, credentials: Credentials) -> Connection:
        """Connect; see Transport.connect."""
        parsed = parse_address(address)
        parsed.require_options()
        credentials.require_only(address)
        sock = await open_connection(parsed, limits.connect_timeout_s)
        try:
            return TcpConnection(sock, limits)
        except OSError as error:
            sock.close()
            raise ConnectError(
                f"cannot connect to {address}: the peer closed at once; check its log"
            ) from error

    async def listen(
        self, address: str, handler: Handler, limits: Limits, credentials: Credentials
    ) -> Listener:
        """Listen; see Transport.listen."""
        parsed = parse_address(address)
        parsed.require_options()
        credentials.require_only(address)
        sockets = await open_listeners(parsed)
        return TcpListener(contact_text(parsed, sockets[0]), sockets, handler, limits)


def _after(nbytes: int, buffers: list[memoryview]) -> list[memoryview]:
    """What is left of ``buffers`` behind their first ``nbytes`` bytes."""
    for index, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[index + 1 :]]
        nbytes -= len(buffer)
    return []
