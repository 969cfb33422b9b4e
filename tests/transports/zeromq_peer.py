"""The other process of the ZeroMQ tests: ``python -m`` this module, a role and an address."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import privatelora.transports.zeromq  # noqa: F401  # see main
from privatelora.errors import PrivateLoRAError
from privatelora.transports.base import Connection
from privatelora.transports.registry import connect, listen
from tests.transports.support import SMALL_QUEUE

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
LAST_WORDS = [bytes([number]) * 1000 for number in range(5)]


@contextmanager
def running(role: str, address: str) -> Iterator[subprocess.Popen[str]]:
    """The process in that role, until it is killed."""
    command = [sys.executable, "-m", __name__, role, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


async def output_line(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return (await asyncio.to_thread(process.stdout.readline)).rstrip()


async def say_last_words(connection: Connection) -> None:
    for frame in LAST_WORDS:
        await connection.send(frame)
    await asyncio.Event().wait()


async def main() -> None:
    _, role, address = sys.argv
    if role == "talk":
        await say_last_words(await connect(address, SMALL_QUEUE))
    elif role == "listen":
        async with await listen(address, say_last_words) as listener:
            print(listener.address, flush=True)
            await asyncio.Event().wait()
    elif role == "connect as nobody":
        # All code is imported by now; another user may not be able to read it.
        os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            await connect(address)
        except PrivateLoRAError as error:
            print(type(error).__name__, error, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
