"""What the transport tests share besides fixtures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from privatelora.transports.base import Connection, Limits

MIB = 2**20
SMALL_QUEUE = Limits(max_queued_nbytes=64 * 1024)
# More than sockets buffer, so that a second one cannot be sent while the first is not taken.
HUGE = 48 * MIB


async def echo(connection: Connection) -> None:
    while True:
        await connection.send(await connection.recv())


async def tells_trust(connection: Connection) -> None:
    """Answers each frame with whether the peer is trusted still."""
    while True:
        await connection.recv()
        await connection.send(str(connection.is_trusted).encode())


async def send_for_ever(connection: Connection) -> None:
    while True:
        await connection.send(b"x" * 1000)
        await asyncio.sleep(0)


async def received(connection: Connection) -> bytes:
    """The next frame."""
    return bytes(await connection.recv())


async def echoes(connection: Connection, frame: bytes = b"well?") -> None:
    """What is sent comes back: the handler at the other end is ``echo``."""
    await connection.send(frame)
    assert await received(connection) == frame


async def settled(condition: Callable[[], bool]) -> None:
    """Let the loop run until ``condition`` holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0)


async def blocked(awaitable: Awaitable[None]) -> asyncio.Task[None]:
    """A task of ``awaitable``, which is expected to get stuck and does."""

    async def run() -> None:
        await awaitable

    task = asyncio.create_task(run())
    _, pending = await asyncio.wait({task}, timeout=0.1)
    assert pending
    return task


async def cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
