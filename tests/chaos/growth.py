"""Whether a process grows: its memory, descriptors, threads, and whatever else is counted."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Callable
from statistics import median

import psutil

from tests.chaos.daemon import Daemon
from tests.chaos.outcome import Growth

SAMPLE_S = 1.0
MIN_SAMPLES = 16
"""Fewer say nothing."""
MIN_LIFETIME_S = 300.0
"""Of a shorter one growth is shown, and may be what any process takes at first."""
MAX_MEMORY_MIB = 32.0
MAX_DESCRIPTORS = 8.0
MAX_THREADS = 2.0
MAX_OTHERS = 16.0

Sample = dict[str, float]

_MIB = 2**20
_GAUGE = re.compile(r"^privatelora_cloud_(sessions|waiting_sessions) (\S+)$", re.MULTILINE)


def sample_process(process: psutil.Process) -> Sample:
    """Of a process as it is now. Raises psutil.Error if it has gone."""
    with process.oneshot():
        return {
            "memory_mib": process.memory_info().rss / _MIB,
            "descriptors": float(process.num_fds()),
            "threads": float(process.num_threads()),
        }


def measured(samples: list[Sample]) -> Growth | None:
    """From the second quarter of a process' life to its last quarter, by their medians.

    The first quarter is left out: a process fills its caches then. None for too few samples,
    which are ``SAMPLE_S`` apart.
    """
    size = len(samples) // 4
    if len(samples) < MIN_SAMPLES:
        return None
    early, late = samples[size : 2 * size], samples[-size:]

    def grown(name: str) -> float:
        known = [[s[name] for s in part if name in s] for part in (early, late)]
        if not all(known):
            return 0.0
        before, after = map(median, known)
        return round(after - before, 2)

    names = {name for sample in samples for name in sample}
    others = sorted(names - {"memory_mib", "descriptors", "threads"})
    return Growth(
        lifetime_s=len(samples) * SAMPLE_S,
        memory_mib=grown("memory_mib"),
        descriptors=grown("descriptors"),
        threads=grown("threads"),
        others={name: grown(name) for name in others},
    )


def too_much(growth: Growth) -> bool:
    """Whether it grew more than chance explains; never of a short life."""
    return growth.lifetime_s >= MIN_LIFETIME_S and (
        growth.memory_mib > MAX_MEMORY_MIB
        or growth.descriptors > MAX_DESCRIPTORS
        or growth.threads > MAX_THREADS
        or any(value > MAX_OTHERS for value in growth.others.values())
    )


class Watch:
    """Samples daemons while it runs, and keeps what it saw of each one's longest life.

    ``daemons``: by name, those that run now.
    """

    def __init__(self, daemons: Callable[[], dict[str, Daemon]], metrics_url: str) -> None:
        self._daemons = daemons
        self._metrics_url = metrics_url
        self._lives: dict[str, dict[int, list[Sample]]] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            for name, daemon in list(self._daemons().items()):
                await self._sample(name, daemon)
            await asyncio.sleep(SAMPLE_S)

    def growth(self) -> dict[str, Growth]:
        """Of each daemon, over its longest life that can be judged."""
        found = {}
        for name, lives in self._lives.items():
            if (growth := measured(max(lives.values(), key=len))) is not None:
                found[name] = growth
        return found

    async def _sample(self, name: str, daemon: Daemon) -> None:
        try:
            sample = sample_process(daemon.process)
        except psutil.Error:  # it was killed meanwhile
            return
        if name == "cloud":
            sample |= await asyncio.to_thread(_gauges, self._metrics_url)
        self._lives.setdefault(name, {}).setdefault(daemon.pid, []).append(sample)


def _gauges(url: str) -> Sample:
    try:
        with urllib.request.urlopen(url, timeout=SAMPLE_S) as answer:
            text = answer.read().decode()
    except OSError:  # it is stopped, or was killed meanwhile
        return {}
    return {name: float(value) for name, value in _GAUGE.findall(text)}
