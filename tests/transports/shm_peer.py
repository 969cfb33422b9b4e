"""The other process of the shm:// tests: ``python -m tests.transports.shm_peer ADDRESS ROLE UID``.

Prints "ready" and does as its role says until it is killed or the connection ends.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from privatelora.errors import ConnectionClosed, PrivateLoRAError
from privatelora.transports.base import Limits
from privatelora.transports.registry import connect, listen
from privatelora.transports.shm import DEFAULT_SPIN_S
from tests.transports.support import HUGE, SMALL_QUEUE, blocked, echo

ROOT = Path(__file__).resolve().parents[2]


def command(address: str, role: str, uid: int | None = None) -> list[str]:
    """What to run, in the folder ROOT."""
    uid = os.geteuid() if uid is None else uid
    return [sys.executable, "-m", __name__, address, role, str(uid)]


def ready() -> None:
    print("ready", flush=True)


async def listen_and_echo(address: str, spin_s: float) -> None:
    async with await listen(address, echo, Limits(spin_s=spin_s)):
        ready()
        await asyncio.Event().wait()


async def get_stuck_in_a_frame(address: str) -> None:
    """Sends a whole frame and a part of the next, and takes one frame and no more."""
    connection = await connect(address, SMALL_QUEUE)
    await connection.send(bytes(HUGE))
    sender = await blocked(connection.send(bytes(HUGE)))
    ready()
    await sender


async def report_connecting(address: str) -> None:
    try:
        await connect(address)
    except PrivateLoRAError as error:
        print(type(error).__name__, error, flush=True)


async def main() -> None:
    _, address, role, uid = sys.argv
    # Everything is imported by now; another user may not be able to read it.
    os.setresuid(int(uid), int(uid), int(uid))
    try:
        if role == "echo":
            await listen_and_echo(address, DEFAULT_SPIN_S)
        elif role == "echo without spinning":
            await listen_and_echo(address, 0)
        elif role == "get stuck":
            await get_stuck_in_a_frame(address)
        else:
            await report_connecting(address)
    except ConnectionClosed:
        pass


if __name__ == "__main__":
    asyncio.run(main())
