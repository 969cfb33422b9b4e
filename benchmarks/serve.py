"""Many sessions on one cloud: what they get together, and each of them, at several distances.

Method. One cloud daemon and a few edge processes (``serve_worker.py``), which share out the
sessions. Distance is emulated on the edges' connections (``impaired``), half the round trip time
in each direction. All sessions of a run decode at once, end-of-sequence banned; counted is the
time in which all of them decode: from the moment the last has its first tokens behind it to the
moment the first has its last. Tokens count whole: those of several sessions that the ends of that
time cut are lost, so their rates come out up to a token in ``tokens`` low. The roofline of N
sessions at some distance is the smaller of N times what one session gets there and what N sessions
get together without any distance: one session is bound by its round trips, all together by the
processors.

Comparison. Each number of sessions at each distance is measured with our scheduler and, right
after it, with each baseline of ``whole_steps.py``: the same daemon, engine and edges but for the
scheduler. All have the same roofline, that of our scheduler.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from privatelora.benchmarks.measure import machine_facts
from privatelora.benchmarks.shards import split_with_adapter
from privatelora.benchmarks.whole_steps import LOCKSTEP, WHOLE_STEPS
from privatelora.cli._daemons import Daemon
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.plan_file import make_plan
from privatelora.runtime.device import compute_device

NUM_SKIPPED = 4
"""First tokens of each session that are not counted."""
OURS = "ours"
SCHEDULINGS = (OURS, LOCKSTEP, WHOLE_STEPS)
STEP_TIMEOUT_S = 3600.0
"""A step may wait long: for those of all other sessions, in lockstep."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class ServeSettings:
    """One run of the benchmark. ``dtype``: what cloud and edges compute in.

    ``compare``: with the baselines too. ``device``: of the cloud.
    """

    model: str
    every: int
    rtts_ms: tuple[float, ...]
    prompt_tokens: int
    tokens: int
    dtype: str
    directory: Path
    sessions: tuple[int, ...] = (2,)
    num_edges: int = 1
    compare: bool = False
    device: str = "cpu"

    @property
    def deployment(self) -> dict[str, Any]:
        """What was served, as every result names it."""
        return {
            "model": self.model,
            "every": self.every,
            "dtype": self.dtype,
            "device": self.device,
        }


def measure_serving(settings: ServeSettings, report: Report) -> dict[str, Any]:
    """Measure every number of sessions at every distance, 0 first.

    Raises ConfigError, PartitionError, and PrivateLoRAError for what a daemon fails with.
    """
    compute_device(settings.device)  # before the work that it would fail after
    report("splitting the model")
    round_trips = prepare(settings)
    rows = []
    with ExitStack() as clouds:
        addresses = {
            scheduling: clouds.enter_context(serving(settings, scheduling))
            for scheduling in (SCHEDULINGS if settings.compare else (OURS,))
        }
        for rtt_ms in sorted({0.0, *settings.rtts_ms}):
            with ExitStack() as connected:
                edges = {
                    scheduling: connected.enter_context(
                        connected_edges(settings, address, [rtt_ms] * settings.num_edges)
                    )
                    for scheduling, address in addresses.items()
                }
                for sessions in sorted({1, *settings.sessions}):
                    for scheduling in edges:
                        report(f"{scheduling}: {sessions} sessions at {rtt_ms:g} ms")
                        figures = _decode(settings, edges[scheduling], sessions)
                        place = {"sessions": sessions, "rtt_ms": rtt_ms, "scheduling": scheduling}
                        rows.append(place | figures)
    return {
        "benchmark": "serve",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {
            **settings.deployment,
            "prompt_tokens": settings.prompt_tokens,
            "tokens": settings.tokens,
            "num_edges": settings.num_edges,
            "compare": settings.compare,
        },
        "round_trips_per_token": round_trips,
        "rows": with_roofline(rows),
    }


def summarise(times: Sequence[Sequence[float]]) -> dict[str, float]:
    """Rates from the moments at which the tokens of each session came, in seconds."""
    start = max(session[NUM_SKIPPED] for session in times)
    end = min(session[-1] for session in times)
    if end <= start:
        raise ValueError("the sessions did not overlap: decode more tokens")
    counted = [[moment for moment in session if start <= moment <= end] for session in times]
    gaps = sorted(
        (after - before) * 1e3
        for session in counted
        for before, after in itertools.pairwise(session)
    )
    aggregate = sum(len(session) - 1 for session in counted) / (end - start)
    return {
        "aggregate_tokens_per_s": aggregate,
        "session_tokens_per_s": aggregate / len(times),
        "time_per_token_ms_p50": gaps[len(gaps) // 2] if gaps else math.nan,
        "time_per_token_ms_p99": gaps[len(gaps) * 99 // 100] if gaps else math.nan,
        "seconds": end - start,
    }


def with_roofline(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row the roofline and what share of it was reached; those at 0 ms are there."""
    rate = {
        (row["sessions"], row["rtt_ms"]): row["aggregate_tokens_per_s"]
        for row in rows
        if row["scheduling"] == OURS
    }
    for row in rows:
        sessions, rtt_ms = row["sessions"], row["rtt_ms"]
        row["roofline_tokens_per_s"] = min(sessions * rate[1, rtt_ms], rate[sessions, 0.0])
        row["vs_roofline"] = row["aggregate_tokens_per_s"] / row["roofline_tokens_per_s"]
    return rows


def prepare(settings: ServeSettings) -> int:
    """Split the model and make an adapter; return round trips per token."""
    place = settings.directory
    with open_checkpoint(settings.model) as checkpoint:
        plan = make_plan(checkpoint.config, every=settings.every)
        dtype: torch.dtype = getattr(torch, settings.dtype)
        adapter_file = place / "adapter.safetensors"
        split_with_adapter(checkpoint, plan, place / "shards", adapter_file, dtype)
    return 1 + len(plan.wire_points)


@contextmanager
def serving(settings: ServeSettings, scheduling: str = OURS, **changes: Any) -> Iterator[str]:
    """A cloud of the model; its address. ``changes``: of the settings in its file."""
    file = write_settings(settings.directory / "cloud.yaml", cloud_config(settings) | changes)
    if scheduling == OURS:
        daemon = Daemon("privatelora.cli.serve", file)
    else:
        daemon = Daemon("privatelora.benchmarks.serve_cloud", file, scheduling)
    with daemon as cloud:
        yield cloud.read_address()


def cloud_config(settings: ServeSettings) -> dict[str, Any]:
    """Settings of a cloud of the model, with room for all sessions."""
    most = max(16, *settings.sessions)
    return {
        "listen": "tcp://127.0.0.1:0",
        "shard": "shards/cloud",
        "device": settings.device,
        "num_threads": 1,
        "max_sessions": most,
        "max_sessions_per_client": most,
        "max_cached_positions": 4096 + most * (settings.prompt_tokens + settings.tokens + 64),
    }


@contextmanager
def connected_edges(
    settings: ServeSettings, address: str, rtts_ms: Sequence[float], **changes: Any
) -> Iterator[list[Daemon]]:
    """Edges at these distances, connected."""
    with ExitStack() as stack:
        edges = []
        for number, rtt_ms in enumerate(rtts_ms):
            config = edge_config(address, rtt_ms) | changes
            file = write_settings(settings.directory / f"edge-{number}.yaml", config)
            edges.append(stack.enter_context(Daemon("privatelora.benchmarks.serve_worker", file)))
        for edge in edges:
            edge.read_event("ready")
        yield edges


def edge_config(address: str, rtt_ms: float) -> dict[str, Any]:
    """Settings of an edge at this distance, with paths beside the file they go into."""
    config: dict[str, Any] = {
        "cloud": address,
        "shard": "shards/edge",
        "adapter": "adapter.safetensors",
        "num_threads": 1,
        "payload": "fp16",
        "step_timeout_s": STEP_TIMEOUT_S,
    }
    if rtt_ms:
        # Two of them: YAML would write one twice as an alias, which is not read.
        config["impaired"] = {way: {"delay_ms": rtt_ms / 2} for way in ("up", "down")}
    return config


def _decode(settings: ServeSettings, edges: Sequence[Daemon], sessions: int) -> dict[str, float]:
    for number, edge in enumerate(edges):
        ask(edge, len(range(number, sessions, len(edges))), settings.prompt_tokens, settings.tokens)
    return summarise(token_times(edges))


def ask(edge: Daemon, sessions: int, prompt_tokens: int, tokens: int) -> None:
    """Let an edge decode in this many sessions at once."""
    request = {"sessions": sessions, "prompt_tokens": prompt_tokens, "tokens": tokens}
    edge.write_line(json.dumps(request))


def token_times(edges: Sequence[Daemon]) -> list[list[float]]:
    """Wait until edges are done; the moments of every session's tokens."""
    return [session for edge in edges for session in edge.read_event("decoded")["times"]]


def write_settings(path: Path, values: dict[str, Any]) -> Path:
    """Write a YAML file."""
    path.write_text(yaml.safe_dump(values))
    return path
