"""Scheduling policies of the cloud, compared in simulation.

Method. The real scheduler runs against a simulated engine and network (``scheduling_simulator``).
Sessions that decode without a pause begin at random within one token; figures count from when all
of them decode until the first has finished. The roofline is N times the rate of one session at
the same round trip time, or the rate of N sessions at 0 ms with the same policy if that is lower.
Beside the policies stand lockstep, one step at a time with its round trips waited out, and
batches of whole steps. The cost of scheduling is real time, on this machine.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from privatelora.benchmarks.measure import machine_facts
from privatelora.benchmarks.scheduling_simulator import (
    Costs,
    Edge,
    Outcome,
    simulate,
)
from privatelora.benchmarks.whole_steps import LOCKSTEP, WHOLE_STEPS, WholeSteps
from privatelora.errors import ConfigError
from privatelora.runtime.scheduler import Scheduler
from privatelora.runtime.scheduling_policies import POLICIES

NUM_CLIENTS = 4
JITTER = 0.1
PROMPT_TOKENS = 2048
COST_SESSIONS = (1, 8, 64, 256)
COST_STEPS = 30_000

Report = Callable[[str], None]


@dataclass(frozen=True)
class SchedulingSettings:
    """One run of the benchmark; ConfigError for what cannot be simulated.

    ``num_segments``: exchange points on the wire and one. ``num_tokens``: of each session.
    """

    num_sessions: tuple[int, ...]
    rtts_ms: tuple[float, ...]
    num_segments: int = 30
    num_tokens: int = 16
    max_batch_rows: int = 128

    def __post_init__(self) -> None:
        if min(self.num_sessions) < 1:
            raise ConfigError(f"--sessions {min(self.num_sessions)}: give numbers from 1")
        if not all(0 <= rtt_ms <= 10_000 for rtt_ms in self.rtts_ms):
            raise ConfigError("--rtt-ms: give times from 0 to 10000")


def measure_scheduling(settings: SchedulingSettings, report: Report) -> dict[str, Any]:
    """Decoding by sessions and round trip time, a few situations, and the cost per step."""
    rows = _decoding_rows(settings, report)
    report("prompts, stragglers, floods and arrivals")
    situations = [
        {"policy": name, **_situations(settings, name)} for name in (*POLICIES, WHOLE_STEPS)
    ]
    report("cost of scheduling")
    return {
        "benchmark": "scheduling",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {**asdict(settings), "costs": asdict(Costs())},
        "rows": rows,
        "situations": situations,
        "cost_rows": [
            {"sessions": number, "us_per_step": scheduling_cost_us(number, settings.num_segments)}
            for number in COST_SESSIONS
        ],
    }


def _scheduler(settings: SchedulingSettings, name: str) -> Scheduler:
    if name in POLICIES:
        return Scheduler(settings.num_segments, POLICIES[name], settings.max_batch_rows)
    max_steps = 1 if name == LOCKSTEP else None
    return WholeSteps(settings.num_segments, max_steps, settings.max_batch_rows)


def _decoding_rows(settings: SchedulingSettings, report: Report) -> list[dict[str, Any]]:
    known: dict[tuple[str, int, float], dict[str, Any]] = {}

    def measured(name: str, number: int, rtt_ms: float) -> dict[str, Any]:
        key = name, number, rtt_ms
        if key not in known:
            report(f"{name}: {number} sessions at {rtt_ms:g} ms")
            edges = _decoding(settings, number, rtt_ms)
            outcome = simulate(_scheduler(settings, name), settings.num_segments, edges)
            known[key] = _figures(outcome)
        return known[key]

    rows = []
    for number in settings.num_sessions:
        for rtt_ms in settings.rtts_ms:
            for name in (*POLICIES, WHOLE_STEPS, LOCKSTEP):
                figures = measured(name, number, rtt_ms)
                roofline = min(
                    number * measured(name, 1, rtt_ms)["aggregate_tokens_per_s"],
                    measured(name, number, 0.0)["aggregate_tokens_per_s"],
                )
                rows.append(
                    {
                        "sessions": number,
                        "rtt_ms": rtt_ms,
                        "policy": name,
                        **figures,
                        "roofline_tokens_per_s": roofline,
                        "vs_roofline": figures["aggregate_tokens_per_s"] / roofline,
                    }
                )
    return rows


def _rtt_s(rtt_ms: float) -> tuple[float, float]:
    return rtt_ms / 1e3, rtt_ms / 1e3 * (1 + JITTER)


def _decoding(settings: SchedulingSettings, number: int, rtt_ms: float) -> list[Edge]:
    chance = random.Random(number)
    token_s = settings.num_segments * (rtt_ms + 1) / 1e3
    return [
        Edge(
            client=f"client {i % NUM_CLIENTS}",
            rtt_s=_rtt_s(rtt_ms),
            start_s=chance.uniform(0, token_s),
            num_tokens=settings.num_tokens,
        )
        for i in range(number)
    ]


def _figures(outcome: Outcome) -> dict[str, Any]:
    """Of sessions with one turn each, while all of them decode."""
    all_tokens_s = [turn.tokens_s for [turn] in outcome.turns]
    begin_s = max(tokens_s[1] for tokens_s in all_tokens_s)
    end_s = max(min(tokens_s[-1] for tokens_s in all_tokens_s), begin_s)
    rates = []
    for tokens_s in all_tokens_s:
        inside = [token_s for token_s in tokens_s if begin_s <= token_s <= end_s]
        if len(inside) < 2:  # so slow, or so unfairly treated, that the window holds no gap
            inside = tokens_s[1:]
        rates.append((len(inside) - 1) / (inside[-1] - inside[0]))
    gaps_ms = [gap_s * 1e3 for [turn] in outcome.turns for gap_s in turn.gaps_s[1:]]
    return {
        "aggregate_tokens_per_s": sum(rates),
        "time_per_token_ms_p50": _quantile(gaps_ms, 0.5),
        "time_per_token_ms_p99": _quantile(gaps_ms, 0.99),
        "largest_gap_ms": max(gaps_ms),
        "fairness": _jain(rates),
        "mean_batch_rows": outcome.num_rows / outcome.num_batches,
        "busy": outcome.busy_s / outcome.end_s,
    }


def _situations(settings: SchedulingSettings, name: str) -> dict[str, float]:
    """One policy in situations with something special, milliseconds or tokens per second."""

    def run(edges: Sequence[Edge], until_s: float = math.inf) -> Outcome:
        scheduler = _scheduler(settings, name)
        return simulate(scheduler, settings.num_segments, edges, until_s=until_s)

    found: dict[str, float] = {}
    for chunk in (PROMPT_TOKENS, settings.max_batch_rows // 2):
        outcome = run(_prompt_among_decoders(settings, chunk))
        *others, [prompt] = outcome.turns
        label = "whole" if chunk == PROMPT_TOKENS else "chunked"
        found[f"prompt_{label}_first_token_ms"] = 1e3 * (prompt.tokens_s[0] - prompt.asked_s)
        found[f"prompt_{label}_largest_gap_of_others_ms"] = 1e3 * max(
            max(turn.gaps_s) for [turn] in others
        )
    for label, far_ms in (("without", 5.0), ("with", 500.0)):
        near = _decoding(settings, 15, 5)
        far = Edge("far", _rtt_s(far_ms), num_tokens=settings.num_tokens)
        *others, _ = run([*near, far], until_s=60).turns
        rate = sum(len(turn.gaps_s) / (turn.tokens_s[-1] - turn.tokens_s[0]) for [turn] in others)
        found[f"{label}_straggler_tokens_per_s_of_others"] = rate
    for label, edges in _floods(settings).items():
        [victim] = run(edges, until_s=15).turns[-1]
        found[f"tokens_per_s_{label}"] = (
            len(victim.gaps_s) / (victim.tokens_s[-1] - victim.tokens_s[0])
            if victim.gaps_s
            else 0.0
        )
    outcome = run(_arrivals(settings))
    turns = [turn for turns in outcome.turns for turn in turns]
    gaps_ms = [1e3 * gap_s for turn in turns for gap_s in turn.gaps_s]
    firsts_ms = [1e3 * (turn.tokens_s[0] - turn.asked_s) for turn in turns]
    found["arrivals_first_token_ms_p50"] = _quantile(firsts_ms, 0.5)
    found["arrivals_first_token_ms_p99"] = _quantile(firsts_ms, 0.99)
    found["arrivals_time_per_token_ms_p50"] = _quantile(gaps_ms, 0.5)
    found["arrivals_time_per_token_ms_p99"] = _quantile(gaps_ms, 0.99)
    return found


def _prompt_among_decoders(settings: SchedulingSettings, chunk: int) -> list[Edge]:
    decoders = _decoding(settings, 8, 20)
    chunks = (chunk,) * (PROMPT_TOKENS // chunk)
    start_s = 2 * settings.num_segments * 21e-3
    return [*decoders, Edge("client 0", _rtt_s(20), start_s, chunks, num_tokens=1)]


def _floods(settings: SchedulingSettings) -> dict[str, list[Edge]]:
    """One decoding session, last, alone and beside 16 sessions of another client."""
    victim = Edge("victim", _rtt_s(5), 1.0, num_tokens=settings.num_tokens)
    chunks = (settings.max_batch_rows // 2,) * 16
    prompts = [Edge("flood", _rtt_s(5), 0.0, chunks, 1, num_turns=50) for _ in range(16)]
    decoders = [Edge("flood", _rtt_s(5), num_tokens=10_000) for _ in range(16)]
    return {
        "alone": [victim],
        "beside_16_decoding": [*decoders, victim],
        "beside_16_prompting": [*prompts, victim],
    }


def _arrivals(settings: SchedulingSettings) -> list[Edge]:
    """Conversations that arrive at random and want about half of what the engine can do."""
    chance, edges, start_s = random.Random(7), [], 0.0
    for number in range(30):
        start_s += chance.expovariate(20 / settings.num_segments)
        rtt_s = _rtt_s(chance.choice((5, 20, 80)))
        chunks = (settings.max_batch_rows // 2,) * chance.randint(1, 8)
        num_tokens = chance.randint(4, 2 * settings.num_tokens)
        client = f"client {number % NUM_CLIENTS}"
        edges.append(Edge(client, rtt_s, start_s, chunks, num_tokens, num_turns=2, think_s=1.0))
    return edges


def scheduling_cost_us(num_sessions: int, num_segments: int) -> float:
    """Real microseconds of the scheduler for a step and a segment, in batches of random sizes."""
    chance = random.Random(num_sessions)
    scheduler = Scheduler(num_segments)
    waiting: list[tuple[int, int]] = []
    num_steps = 0
    for session in range(num_sessions):
        scheduler.open(session, f"client {session % NUM_CLIENTS}")
        scheduler.begin(session, 0, 1, 0.0)
    start = time.perf_counter()
    while num_steps < COST_STEPS:
        batch = scheduler.next_batch(0.0)
        if batch is not None:
            scheduler.done(batch, 0.0)
            num_steps += len(batch.steps)
            if batch.segment < num_segments - 1:
                waiting += batch.steps
            else:
                for session, step in batch.steps:
                    scheduler.begin(session, step + 1, 1, 0.0)
        num_answered = chance.randint(0, len(waiting))
        for session, step in waiting[:num_answered]:
            scheduler.supply(session, step, 0.0)
        del waiting[:num_answered]
    return (time.perf_counter() - start) / num_steps * 1e6


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _jain(rates: Sequence[float]) -> float:
    """Jain's index: 1 if all are equal, 1/n if one has everything."""
    return sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates))
