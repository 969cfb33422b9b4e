"""``inproc://name``: both ends in one process and one event loop.

Frames are copied when they are sent, so neither end sees what the other does to its memory
later. No framing, so the byte counters count payload only.
"""

from __future__ import annotations

import asyncio

from privatelora.errors import ConnectError, ConnectionClosed
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
from privatelora.transports.flow import wake
from privatelora.transports.framing import frame_nbytes, oversized
from privatelora.transports.handlers import HandlerTasks

_listeners: dict[str, InprocListener] = {}


class InprocConnection(QueuedConnection):
    """One of two connections that put frames into each other's queue."""

    def __init__(self, peer: str, limits: Limits) -> None:
        super().__init__(peer, limits)
        self._other: InprocConnection
        self._discarding = False
        self._room_waiter: asyncio.Future[None] | None = None

    @classmethod
    def pair(
        cls, name: str, limits: Limits, other_limits: Limits
    ) -> tuple[InprocConnection, InprocConnection]:
        """Two connected ends."""
        one, other = cls(name, limits), cls(name, other_limits)
        one._other, other._other = other, one
        return one, other

    async def send(self, *parts: Buffer) -> None:
        """Send one frame; see Connection.send."""
        nbytes = frame_nbytes(parts, self._limits.max_frame_nbytes)
        self._raise_if_refused()
        async with self._turns:
            self._raise_if_broken()
            while self._other._queue.full:
                self._room_waiter = self._loop.create_future()
                await self._room_waiter
                self._raise_if_broken()
            self._other._accept(memoryview(bytearray().join(parts)))
        self.counters.sent_nbytes += nbytes
        self.counters.sent_frames += 1

    def _accept(self, frame: memoryview) -> None:
        if self._discarding:
            return
        if len(frame) > self._limits.max_frame_nbytes:
            self._fail(oversized(len(frame), self._limits.max_frame_nbytes, self._peer))
            return
        self.counters.received_nbytes += len(frame)
        self.counters.received_frames += 1
        self._queue.put(frame)

    def _room_made(self) -> None:
        wake(self._other._room_waiter)

    def _discard_incoming(self) -> None:
        self._discarding = True
        self._room_made()

    def _end_sending(self) -> None:
        self._other._queue.end(
            ConnectionClosed(f"the connection to {self._peer} was closed by the peer")
        )
        self._other._peer_ended.set()

    def _release(self, *, reset: bool) -> None:
        wake(self._room_waiter)
        if not reset or self._other._released:
            return
        error = ConnectionClosed(f"the connection to {self._peer} was aborted by the peer")
        self._other._queue.end(error)
        self._other._finish(error, reset=False)


class InprocListener(Listener):
    """A name in this process that can be connected to."""

    def __init__(self, address: str, name: str, handler: Handler, limits: Limits) -> None:
        self.loop = asyncio.get_running_loop()
        self._address = address
        self._name = name
        self._limits = limits
        self._handlers = HandlerTasks(handler, address)
        _listeners[name] = self

    @property
    def address(self) -> str:
        """Contact address."""
        return self._address

    def open(self, limits: Limits) -> InprocConnection:
        """Make a connection to this listener and start its handler; return the other end."""
        near, far = InprocConnection.pair(self._address, limits, self._limits)
        self._handlers.start(far)
        return near

    async def aclose(self) -> None:
        """Free the name, cancel the handlers and wait for them."""
        if _listeners.get(self._name) is self:
            del _listeners[self._name]
        await self._handlers.aclose()


class InprocTransport(Transport):
    """``inproc://name``."""

    async def connect(self, address: str, limits: Limits, credentials: Credentials) -> Connection:
        """Connect to the listener of that name; see Transport.connect."""
        name = _name(address)
        credentials.require_only(address)
        listener = _listeners.get(name)
        if listener is None or listener.loop is not asyncio.get_running_loop():
            raise ConnectError(
                f"cannot connect to {address}: nothing listens on it in this event loop; "
                "start the listener first, or use tcp:// between processes"
            )
        return listener.open(limits)

    async def listen(
        self, address: str, handler: Handler, limits: Limits, credentials: Credentials
    ) -> Listener:
        """Take the name; see Transport.listen."""
        name = _name(address)
        credentials.require_only(address)
        holder = _listeners.get(name)
        # A loop that ended without closing its listener must not hold the name for ever.
        if holder is not None and not holder.loop.is_closed():
            raise ConnectError(
                f"cannot listen on {address}: address in use; close its listener or choose "
                "another name"
            )
        return InprocListener(address, name, handler, limits)


def _name(text: str) -> str:
    address = parse_address(text)
    address.require_options()
    return address.require_name()
