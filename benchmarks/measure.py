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
