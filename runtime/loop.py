"""Running a daemon's coroutine on the fastest event loop there is."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import resource
import signal
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end on uvloop, or on asyncio's own loop where uvloop is missing."""
    raise_descriptor_limit()
    try:
        factory = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        factory = None
    # What was loaded stays: leaving it to every full collection would pause decoding.
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def raise_descriptor_limit() -> None:
    """Let this process open as many files and sockets as the system lets it ask for.

    What programs get without asking is often 1024, kept low for those that use ``select()``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS says "unlimited" and means less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class StopSignals:
    """Hears SIGTERM and SIGINT while its context lasts. Each ends one wait, now or the next."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()

    async def wait(self) -> None:
        """Return when the process is asked to stop."""
        await self._stop.wait()
        self._stop.clear()

    async def bound(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` until it ends or the process is asked to stop, which cancels it."""
        tasks = {asyncio.create_task(work), asyncio.create_task(self.wait())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stop.set)
        return self

    def __exit__(self, *exc: object) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def wait_for_stop() -> None:
    """Return when the process is asked to stop (SIGTERM or SIGINT)."""
    with StopSignals() as stop:
        await stop.wait()


async def until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` until it ends or the process is asked to stop, which cancels it."""
    with StopSignals() as stop:
        await stop.bound(work)
