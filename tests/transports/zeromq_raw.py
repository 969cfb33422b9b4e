"""A bare DEALER that speaks the messages of a ZeroMQ connection, or breaks their rules."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from privatelora.transports.base import NO_CREDENTIALS, Connection, Credentials, Limits, Listener
from privatelora.transports.registry import listen
from privatelora.transports.zeromq_protocol import (
    ABORT_MESSAGE,
    ACCEPT,
    CONFIRM,
    OPEN_MESSAGE,
    greeting,
    parse_greeting,
)
from tests.transports.support import settled

WINDOW_NBYTES = 2**20


class Raw:
    """``socket``: connected to a listener; nothing was said yet."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self.socket.send(message, zmq.NOBLOCK)

    async def answer(self) -> bytes:
        """The next message, while the event loop runs on."""
        await settled(self.has_answer)
        return self.socket.recv(zmq.NOBLOCK)

    def has_answer(self) -> bool:
        return bool(self.socket.poll(0))

    async def open(self, window_nbytes: int = WINDOW_NBYTES) -> None:
        """Do as a client does until the listener runs its handler."""
        self.send(OPEN_MESSAGE)
        token, _ = parse_greeting(memoryview(await self.answer()), ACCEPT, "the listener")
        self.send(greeting(CONFIRM, token, window_nbytes))

    async def aborted(self) -> None:
        """The next message is the abort."""
        assert await self.answer() == ABORT_MESSAGE


@contextmanager
def raw_client(address: str, routing_id: bytes | None = None) -> Iterator[Raw]:
    """A socket connected to the contact address."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        if routing_id is not None:
            socket.setsockopt(zmq.ROUTING_ID, routing_id)
        socket.connect(address.removeprefix("zmq+"))
        yield Raw(socket)


class Accepting:
    """A listener that keeps its connections."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[Connection] = asyncio.Queue()
        self.listener: Listener

    @classmethod
    async def on(
        cls, address: str, limits: Limits, credentials: Credentials = NO_CREDENTIALS
    ) -> Accepting:
        accepting = cls()
        accepting.listener = await listen(address, accepting.handle, limits, credentials)
        return accepting

    async def handle(self, connection: Connection) -> None:
        self.connections.put_nowait(connection)
        await asyncio.Event().wait()
