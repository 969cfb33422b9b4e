"""What splitting costs: decode speed split, unsplit, and in transformers, in one run.

Method. Every engine runs in its own process with the same number of threads; the split one is
two processes, the cloud daemon and an edge, over TCP on the loopback interface. So the decoder
has the same processors everywhere, and the edge its own, as on a device of its own. Since this
leaves a processor idle while the other engines run, they are measured on all processors too
(``..._all_cpus``). First each engine decodes briefly in every dtype and keeps its fastest. Then
the engines take turns for ``rounds`` rounds, each decoding the same number of tokens after the
same prompt, the first ones not counted, with end-of-sequence banned. Ratios are of runs of the
same round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml

from privatelora.benchmarks.measure import Spread, machine_facts, paired_ratios
from privatelora.benchmarks.shards import split_with_adapter
from privatelora.benchmarks.worker import EngineName, MeasureRequest
from privatelora.cli._daemons import Daemon
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.plan_file import make_plan

DtypeName = Literal["float16", "bfloat16", "float32"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
CALIBRATION = MeasureRequest(prompt_tokens=16, warmup_tokens=4, tokens=12)
SPIN_US = 5000
"""Longer than the longest segment, so that no figure holds the wake-up of a sleeping processor."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class OverheadSettings:
    """One run of the benchmark. ``num_threads`` is per process."""

    model: str
    every: tuple[int, ...]
    rounds: int
    tokens: int
    prompt_tokens: int
    num_threads: int
    directory: Path


@dataclass(frozen=True)
class _Run:
    """One row of the result."""

    label: str
    engine: EngineName
    dtype: DtypeName
    num_threads: int


def measure_overhead(settings: OverheadSettings, report: Report) -> dict[str, Any]:
    """Measure every arrangement; the top-level ratios are those of the first."""
    arrangements = [_measure_arrangement(settings, every, report) for every in settings.every]
    first = arrangements[0]
    return {
        "benchmark": "overhead",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {
            "model": settings.model,
            "rounds": settings.rounds,
            "tokens": settings.tokens,
            "prompt_tokens": settings.prompt_tokens,
            "num_threads": settings.num_threads,
            "spin_us": SPIN_US,
        },
        **{name: value for name, value in first.items() if name.startswith("split_vs_")},
        "arrangements": arrangements,
    }


def _measure_arrangement(settings: OverheadSettings, every: int, report: Report) -> dict[str, Any]:
    place = settings.directory / f"every-{every}"
    round_trips = _prepare(settings.model, every, place)
    request = MeasureRequest(
        prompt_tokens=settings.prompt_tokens, warmup_tokens=8, tokens=settings.tokens
    )
    with ExitStack() as stack:
        fastest = {
            name: _fastest_dtype(settings, name, place, report, f"every {every}: {name}")
            for name in ENGINES
        }
        runs = [_Run(name, name, fastest[name], settings.num_threads) for name in ENGINES]
        if (num_cpus := len(os.sched_getaffinity(0))) > settings.num_threads:
            runs += [
                _Run(f"{name}_all_cpus", name, fastest[name], num_cpus)
                for name in ENGINES
                if name != "split"
            ]
        workers = {
            run.label: stack.enter_context(
                _engine(settings, run.engine, run.dtype, place, run.num_threads)
            )
            for run in runs
        }
        rates: dict[str, list[float]] = {label: [] for label in workers}
        for number in range(settings.rounds):
            for name, worker in workers.items():
                report(f"every {every}: round {number + 1} of {settings.rounds}, {name}")
                rates[name].append(_measure(worker, request))
    return {
        "every": every,
        "round_trips_per_token": round_trips,
        **{
            f"split_vs_{label}": paired_ratios(rates["split"], rates[label])._asdict()
            for label in rates
            if label != "split"
        },
        "rows": [
            {
                "engine": run.label,
                "dtype": run.dtype,
                "num_threads": run.num_threads,
                "tokens_per_s": {
                    **Spread.of(rates[run.label])._asdict(),
                    "runs": rates[run.label],
                },
            }
            for run in runs
        ],
    }


def _prepare(model: str, every: int, place: Path) -> int:
    """Partition in float32, from which each engine takes its dtype; return round trips."""
    place.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint.config, every=every)
        adapter_file = place / "adapter.safetensors"
        split_with_adapter(checkpoint, plan, place / "shards", adapter_file, torch.float32)
    return 1 + len(plan.wire_points)


def _fastest_dtype(
    settings: OverheadSettings, name: EngineName, place: Path, report: Report, label: str
) -> DtypeName:
    rates = {}
    for dtype in DTYPES:
        report(f"{label}, trying {dtype}")
        with _engine(settings, name, dtype, place, settings.num_threads) as worker:
            rates[dtype] = max(_measure(worker, CALIBRATION) for _ in range(2))
    return max(rates, key=rates.__getitem__)


@contextmanager
def _engine(
    settings: OverheadSettings, name: EngineName, dtype: DtypeName, place: Path, num_threads: int
) -> Iterator[Daemon]:
    """Start an engine, and for the split one its cloud; give the process that is measured."""
    place = place.absolute()
    config: dict[str, Any] = {
        "engine": name,
        "model": settings.model,
        "shards": str(place / "shards"),
        "adapter": str(place / "adapter.safetensors"),
        "dtype": dtype,
        "num_threads": num_threads,
    }
    with ExitStack() as stack:
        if name == "split":
            common = {"dtype": dtype, "num_threads": num_threads}
            cloud_file = _write(
                place / "cloud.yaml",
                {
                    "listen": "tcp://127.0.0.1:0",
                    "shard": str(place / "shards/cloud"),
                    "spin_us": SPIN_US,
                    **common,
                },
            )
            cloud = stack.enter_context(Daemon("privatelora.cli.serve", cloud_file))
            edge = {
                "cloud": cloud.read_address(),
                "shard": str(place / "shards/edge"),
                "adapter": config["adapter"],
                "spin_us": SPIN_US,
                "payload": "fp16",
                **common,
            }
            config["edge_config"] = str(_write(place / "edge.yaml", edge))
        worker_file = _write(place / f"{name}.yaml", config)
        worker = stack.enter_context(Daemon("privatelora.benchmarks.worker", worker_file))
        worker.read_event("ready")
        yield worker


def _write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def _measure(worker: Daemon, request: MeasureRequest) -> float:
    worker.write_line(json.dumps(request.model_dump()))
    return float(worker.read_event("measured")["tokens_per_s"])
