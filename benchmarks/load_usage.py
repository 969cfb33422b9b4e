"""What a process of this machine takes, from ``/proc`` (Linux)."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

_SAMPLE_S = 0.2
_UTIME, _STIME = 11, 12
"""Fields of ``/proc/PID/stat`` behind the name, proc(5)."""


class Usage(NamedTuple):
    """Of one process now. ``cpu_s``: processor time since it began."""

    cpu_s: float
    rss_mib: float
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Of a process of this user."""
        directory = Path(f"/proc/{pid}")
        # The name in brackets may hold anything.
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[_UTIME]) + int(fields[_STIME])
        resident_pages = int((directory / "statm").read_text().split()[1])
        return cls(
            ticks / os.sysconf("SC_CLK_TCK"),
            resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            len(os.listdir(directory / "fd")),
        )


class Peak:
    """The most that a process takes while the context lasts."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak usage")
        first = Usage.of(pid)
        self.rss_mib, self.descriptors = first.rss_mib, first.descriptors

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            now = Usage.of(self._pid)
            self.rss_mib = max(self.rss_mib, now.rss_mib)
            self.descriptors = max(self.descriptors, now.descriptors)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
