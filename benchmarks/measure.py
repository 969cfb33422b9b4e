"""What all benchmarks share: spreads, paired ratios, and facts about the machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """A figure from several runs."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def paired_ratios(ours: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Ratio run by run, which holds when the machine's speed drifts between runs."""
    return Spread.of([a / b for a, b in zip(ours, baseline, strict=True)])


class StolenTime:
    """How much of the time for which this machine had work its host gave to other machines.

    Since this was made, as Linux counts it (proc(5): steal). Always 0 where nothing counts it.
    """

    def __init__(self) -> None:
        self._busy, self._stolen = _busy_and_stolen()

    def share(self) -> float:
        """From 0 to 1."""
        busy, stolen = _busy_and_stolen()
        busy, stolen = busy - self._busy, stolen - self._stolen
        return stolen / (busy + stolen) if stolen > 0 else 0.0


def _busy_and_stolen() -> tuple[int, int]:
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:]]
    except OSError:
        return 0, 0
    user, nice, system, _, _, irq, softirq, stolen = ticks[:8]
    return user + nice + system + irq + softirq, stolen


def machine_facts() -> dict[str, Any]:
    """Where a figure was measured."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
