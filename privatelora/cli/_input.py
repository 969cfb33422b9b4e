"""Standard input without blocking the event loop."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError


async def read_lines(read: Callable[[], str] = sys.stdin.readline) -> AsyncIterator[str]:
    """Yield lines as ``read`` returns them, until it returns nothing.

    A thread reads, because standard input may be a file, which no event loop can wait for.
    It is a daemon thread: a program that ends does not wait for a line that never comes.
    """
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue(maxsize=16)

    def pump() -> None:
        line = " "
        while line:
            line = read()
            # Waiting here keeps a program that writes faster than it is served from filling memory.
            put = lines.put(line)
            try:
                asyncio.run_coroutine_threadsafe(put, loop).result()
            except (RuntimeError, CancelledError):  # the loop is gone, and the reader with it
                put.close()
                return

    threading.Thread(target=pump, name="privatelora-stdin", daemon=True).start()
    while line := await lines.get():
        yield line
