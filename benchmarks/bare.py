"""What our transports are compared with: echoes with nothing around them.

``uvloop``: an asyncio Protocol on a TCP socket, without frames. ``pyzmq``: a DEALER and a ROUTER
socket of ``zmq.asyncio``. Both as their documentation shows them, and without any of the limits,
checks and back-pressure of a real connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import zmq
import zmq.asyncio


class EchoClient(Protocol):
    """One end of an echo under measurement."""

    async def send(self, frame: bytes, /) -> object:
        """Send one frame."""

    async def recv(self, nbytes: int, /) -> object:
        """Wait for the echo of one frame of ``nbytes``."""


class _EchoProtocol(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)

    # What cannot be written back is not read, or an echo of large frames would fill the memory.
    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()


class _UvloopClient(asyncio.Protocol):
    def __init__(self) -> None:
        self._num_received = 0
        self._num_wanted = 0
        self._received: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._num_received += len(data)
        if self._received is not None and self._num_received >= self._num_wanted:
            self._received.set_result(None)
            self._received = None

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def send(self, frame: bytes, /) -> None:
        """Send one frame."""
        self.transport.write(frame)
        if not self._writable.is_set():
            await self._writable.wait()

    async def recv(self, nbytes: int, /) -> None:
        """Wait for ``nbytes`` more bytes."""
        if self._num_received < nbytes:
            self._num_wanted = nbytes
            self._received = asyncio.get_running_loop().create_future()
            await self._received
        self._num_received -= nbytes


@asynccontextmanager
async def serve_uvloop() -> AsyncIterator[str]:
    """Echo on a TCP port of the loopback interface; gives ``host:port``."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_EchoProtocol, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"


@asynccontextmanager
async def connect_uvloop(address: str) -> AsyncIterator[EchoClient]:
    """A client of ``serve_uvloop``."""
    host, _, port = address.partition(":")
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_connection(_UvloopClient, host, int(port))
    try:
        yield client
    finally:
        transport.abort()


@asynccontextmanager
async def serve_pyzmq() -> AsyncIterator[str]:
    """Echo on a TCP port of the loopback interface; gives a ZeroMQ endpoint."""
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")

        async def echo() -> None:
            while True:
                await router.send_multipart(await router.recv_multipart(copy=False), copy=False)

        task = asyncio.create_task(echo())
        try:
            yield f"tcp://127.0.0.1:{port}"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class _PyzmqClient:
    def __init__(self, dealer: zmq.asyncio.Socket) -> None:
        self._dealer = dealer

    async def send(self, frame: bytes, /) -> None:
        """Send one frame."""
        await self._dealer.send(frame)

    async def recv(self, nbytes: int, /) -> None:
        """Wait for one frame."""
        await self._dealer.recv(copy=nbytes < zmq.COPY_THRESHOLD)


@asynccontextmanager
async def connect_pyzmq(address: str) -> AsyncIterator[EchoClient]:
    """A client of ``serve_pyzmq``."""
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(address)
        yield _PyzmqClient(dealer)
