"""Letting the event loop run, and seeing what it did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from privatelora.transports.base import Connection, Handler


async def settled(condition: Callable[[], bool]) -> None:
    """Let the loop run until ``condition`` holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0)


async def let_run(num_turns: int) -> None:
    """Give everybody else ``num_turns`` turns."""
    for _ in range(num_turns):
        await asyncio.sleep(0)


class Recorder:
    """Passes connections on and remembers them."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.connections: list[Connection] = []

    async def __call__(self, connection: Connection) -> None:
        self.connections.append(connection)
        await self._handler(connection)
