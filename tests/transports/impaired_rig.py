"""An impaired connection on a clock of the test's own, with everything around it."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from typing import Protocol

from privatelora.errors import ConnectionClosed
from privatelora.transports.base import Connection, Limits
from privatelora.transports.emulated_link import Impairment
from privatelora.transports.flow import wake
from privatelora.transports.impaired import ImpairedConnection
from privatelora.transports.inproc import InprocConnection
from tests.transports.support import received

NOTHING = Impairment()
HOUR = Impairment(delay_ms=3_600_000)
SLOW = Impairment(bandwidth_mbps=0.001)
LIMITS = Limits(max_queued_nbytes=64 * 1024, close_timeout_s=10)
NUM_TURNS_TO_BE_IDLE = 30


class VirtualTimer:
    """Time that passes only when nothing else happens in the loop."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._waits: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._num_idle_turns: int | None = None

    def now(self) -> float:
        return self._now

    def wake_at(self, when: float, waiter: asyncio.Future[None]) -> None:
        heapq.heappush(self._waits, (when, next(self._numbers), waiter))
        if self._num_idle_turns is None:
            asyncio.get_running_loop().call_soon(self._turn)
        self._num_idle_turns = 0

    def close(self) -> None:
        self._waits.clear()

    def _turn(self) -> None:
        if not self._waits:
            self._num_idle_turns = None
            return
        self._num_idle_turns = (self._num_idle_turns or 0) + 1
        if self._num_idle_turns > NUM_TURNS_TO_BE_IDLE:
            self._num_idle_turns = 0
            when, _, waiter = heapq.heappop(self._waits)
            if not waiter.done():
                self._now = max(self._now, when)
                wake(waiter)
        asyncio.get_running_loop().call_soon(self._turn)


class Rig:
    """An impaired connection (``near``), its plain other end, and the clock in between."""

    def __init__(self, send: Impairment, receive: Impairment, seed: int, limits: Limits) -> None:
        self.timer = VirtualTimer()
        inner, self.other = InprocConnection.pair("rig", limits, LIMITS)
        self.near = ImpairedConnection(inner, limits, send, receive, seed, self.timer)
        self._start = self.timer.now()

    def elapsed_s(self) -> float:
        return self.timer.now() - self._start

    async def pass_time(self, seconds: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.timer.wake_at(self.timer.now() + seconds, waiter)
        await waiter

    def ends(self, direction: str) -> tuple[Connection, Connection]:
        """(source, sink) of what near sends or receives."""
        near_first = direction == "send"
        return (self.near, self.other) if near_first else (self.other, self.near)


class MakeRig(Protocol):
    def __call__(
        self,
        *,
        send: Impairment = ...,
        receive: Impairment = ...,
        seed: int = ...,
        limits: Limits = ...,
    ) -> Rig: ...


async def receive_all(sink: Connection) -> list[bytes]:
    frames = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            frames.append(await received(sink))
    return frames


async def send_all(source: Connection, frames: list[bytes]) -> None:
    """Until the link is lost."""
    with contextlib.suppress(ConnectionClosed):
        for frame in frames:
            await source.send(frame)
