"""``tcp://host:port``: frames over one TCP connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

from privatelora.errors import ConnectError
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
from privatelora.transports.stream import StreamConnection


class SocketStream:
    """A connected, non-blocking stream socket, which it owns, as a ByteStream."""

    identity: str | None = None

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()

    def recv_into(self, buffer: memoryview | bytearray, /) -> int:
        """See ByteStream."""
        return self._sock.recv_into(buffer)

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        """See ByteStream."""
        return self._sock.sendmsg(buffers)

    def start_reading(self, callback: Callable[[], None]) -> None:
        """See ByteStream."""
        # A handle that has reported an error is dead in uvloop, until it is removed.
        self._loop.remove_reader(self._fd)
        self._loop.add_reader(self._fd, callback)

    def stop_reading(self) -> None:
        """See ByteStream."""
        self._loop.remove_reader(self._fd)

    async def wait_writable(self, waiter: asyncio.Future[None]) -> None:
        """See ByteStream."""
        await wait_writable(self._loop, self._sock, waiter)

    def end_sending(self) -> None:
        """See ByteStream."""
        self._sock.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool) -> None:
        """See ByteStream."""
        # Before closing: afterwards the number may already be another socket's.
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        if reset:
            close_with_reset(self._sock)
        else:
            self._sock.close()


def tcp_connection(sock: socket.socket, limits: Limits) -> StreamConnection:
    """Frames over a connected, configured socket, which the connection owns.

    Raises OSError if the peer is already gone.
    """
    stream = SocketStream(sock, endpoint_text("tcp", sock.getpeername()))
    return StreamConnection(stream, limits, limits.spin_s or 0.0)


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
        self._handlers.start(tcp_connection(sock, self._limits))

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
            return tcp_connection(sock, limits)
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
