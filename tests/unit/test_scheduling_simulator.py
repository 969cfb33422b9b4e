"""The simulator obeys the laws of queues, and in it the default policy does what it is for."""

from __future__ import annotations

from typing import Any

import pytest

from privatelora.benchmarks.scheduling import (
    SchedulingSettings,
    measure_scheduling,
    scheduling_cost_us,
)
from privatelora.benchmarks.scheduling_simulator import Costs, Edge, simulate
from privatelora.benchmarks.whole_steps import WholeSteps
from privatelora.runtime.scheduler import Batch, Scheduler

NUM_SEGMENTS = 5
SEGMENT_US = 600


def decoding(number: int, rtt_s: float, num_tokens: int = 30) -> list[Edge]:
    return [
        Edge(f"client {i}", (rtt_s, rtt_s), start_s=i * 1e-3, num_tokens=num_tokens)
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    settings = SchedulingSettings((1, 8, 32), (0, 5, 20), NUM_SEGMENTS, num_tokens=40)
    return measure_scheduling(settings, lambda what: None)


def rows(result: dict[str, Any], policy: str) -> dict[tuple[int, float], dict[str, Any]]:
    return {
        (row["sessions"], row["rtt_ms"]): row for row in result["rows"] if row["policy"] == policy
    }


def test_the_same_seed_gives_the_same_result() -> None:
    edges = [Edge("a", (0.001, 0.02), chunks=(8, 8)), Edge("b", (0.001, 0.02), num_turns=2)]

    def tokens(seed: int) -> list[list[float]]:
        outcome = simulate(Scheduler(NUM_SEGMENTS), NUM_SEGMENTS, edges, seed=seed)
        return [turn.tokens_s for turns in outcome.turns for turn in turns]

    assert tokens(1) == tokens(1) != tokens(2)


def test_one_session_takes_what_can_be_added_up() -> None:
    costs = Costs(batch_s=1e-3, row_s=1e-4, step_s=0)
    edge = Edge("a", (0.02, 0.02), num_tokens=9, reply_s=0, token_s=0)
    outcome = simulate(Scheduler(NUM_SEGMENTS), NUM_SEGMENTS, [edge], costs)
    [[turn]] = outcome.turns
    assert turn.gaps_s == pytest.approx([NUM_SEGMENTS * (0.02 + 1.1e-3)] * 8)
    assert outcome.num_steps == outcome.num_batches == NUM_SEGMENTS * 9
    assert outcome.busy_s == pytest.approx(NUM_SEGMENTS * 9 * 1.1e-3)


@pytest.mark.parametrize("number", [4, 40])
def test_littles_law(number: int) -> None:
    """Sessions = tokens per second x seconds per token, since each always has one under way."""
    edges = decoding(number, 0.005, num_tokens=60)
    outcome = simulate(Scheduler(NUM_SEGMENTS), NUM_SEGMENTS, edges)
    all_tokens_s = sorted(token_s for [turn] in outcome.turns for token_s in turn.tokens_s)
    half = len(all_tokens_s) // 2
    rate = half / (all_tokens_s[half + half // 2] - all_tokens_s[half // 2])
    gaps_s = [gap_s for [turn] in outcome.turns for gap_s in turn.gaps_s]
    assert rate * sum(gaps_s) / len(gaps_s) == pytest.approx(number, rel=0.1)


def test_the_engine_never_waits_while_something_is_ready() -> None:
    class Watched(Scheduler):
        num_batches = num_idle = 0

        def next_batch(self, now: float) -> Batch | None:
            had_ready = self.has_ready
            batch = super().next_batch(now)
            assert (batch is not None) == had_ready
            self.num_batches += batch is not None
            self.num_idle += batch is None
            return batch

    watched = Watched(NUM_SEGMENTS)
    outcome = simulate(watched, NUM_SEGMENTS, decoding(6, 0.005))
    assert watched.num_batches == outcome.num_batches > 0
    assert watched.num_idle > 0


def test_whole_steps_enter_together_and_lockstep_one_by_one() -> None:
    for max_steps in (1, 3):
        scheduler = WholeSteps(NUM_SEGMENTS, max_steps)
        outcome = simulate(scheduler, NUM_SEGMENTS, decoding(3, 0.02, num_tokens=10))
        assert all(len(turn.tokens_s) == 10 for [turn] in outcome.turns)
        assert outcome.num_steps / outcome.num_batches <= max_steps
    lockstep = simulate(WholeSteps(NUM_SEGMENTS, 1), NUM_SEGMENTS, decoding(3, 0.02))
    one = simulate(Scheduler(NUM_SEGMENTS), NUM_SEGMENTS, decoding(1, 0.02))
    assert lockstep.end_s > 2.3 * one.end_s


def test_the_network_is_hidden(result: dict[str, Any]) -> None:
    for row in rows(result, "laggards_first").values():
        assert row["vs_roofline"] >= 0.8
        assert row["fairness"] > 0.98
        assert row["busy"] <= 1
    assert rows(result, "lockstep")[32, 20]["vs_roofline"] < 0.1


def test_the_default_is_no_worse_than_the_others(result: dict[str, Any]) -> None:
    best = rows(result, "laggards_first")
    for other in ("fullest", "oldest", "whole steps", "lockstep"):
        for key, row in rows(result, other).items():
            ratio = best[key]["aggregate_tokens_per_s"] / row["aggregate_tokens_per_s"]
            assert ratio > 0.97, (other, key)


def test_prompts_stragglers_and_floods(result: dict[str, Any]) -> None:
    found = next(each for each in result["situations"] if each["policy"] == "laggards_first")
    whole, chunked = (
        found[f"prompt_{how}_largest_gap_of_others_ms"] for how in ("whole", "chunked")
    )
    assert chunked < whole / 2
    assert (
        found["with_straggler_tokens_per_s_of_others"]
        > 0.9 * found["without_straggler_tokens_per_s_of_others"]
    )
    for flood in ("decoding", "prompting"):
        assert found[f"tokens_per_s_beside_16_{flood}"] > 0.5 * found["tokens_per_s_alone"]


def test_scheduling_costs_less_than_a_twentieth_of_a_segment() -> None:
    assert min(scheduling_cost_us(64, 30) for _ in range(3)) < SEGMENT_US / 20
