"""A daemon that a chaos run starts, signals and waits for, without holding up its event loop."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil

from tests.e2e.forker import Forker

START_PATIENCE_S = 60.0


class EndedEarlyError(Exception):
    """A daemon ended before it was ready. The message is its exit status and last line."""


class Daemon:
    """One process. ``log``: what it writes on standard error."""

    def __init__(self, forker: Forker, log: Path, module: str, *arguments: object) -> None:
        """Start ``python -m module arguments``."""
        self.log = log
        self._forker = forker
        self._output = log.with_suffix(".out")
        self.pid = forker.start(module, *arguments, stdout=str(self._output), stderr=str(log))
        self._pidfd = os.pidfd_open(self.pid)
        self.process = psutil.Process(self.pid)
        self.is_expected_to_end = False
        """Because it was asked to or killed; or else it did so by itself."""
        self.ended = asyncio.Event()
        self.status = 0
        """Its exit status, once it has ended."""
        asyncio.get_running_loop().add_reader(self._pidfd, self._take_end)

    async def ready(self) -> None:
        """Wait until it says so. Raises EndedEarlyError or TimeoutError."""
        async with asyncio.timeout(START_PATIENCE_S):
            while not (self._output.exists() and self._output.read_text().endswith("\n")):
                if self.ended.is_set():
                    last = (self.log.read_text().splitlines() or [""])[-1]
                    raise EndedEarlyError(f"status {self.status}: {last}")
                await asyncio.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal. SIGTERM and SIGKILL are meant to end it."""
        if number in (signal.SIGTERM, signal.SIGKILL):
            self.is_expected_to_end = True
        if not self.ended.is_set():
            signal.pidfd_send_signal(self._pidfd, number)

    def _take_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.status = self._forker.status(self.pid)
        self._output.unlink(missing_ok=True)
        self.ended.set()
