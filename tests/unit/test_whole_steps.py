"""The baselines of the scheduling benchmarks: steps that go through all segments together."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from privatelora.benchmarks.serve import OURS, with_roofline
from privatelora.benchmarks.whole_steps import LOCKSTEP, WHOLE_STEPS, WholeSteps
from privatelora.errors import PrivateLoRAError
from privatelora.runtime.batch_runner import BatchRunner
from privatelora.runtime.engine import Engine, Step
from privatelora.runtime.scheduler import Batch

NUM_SEGMENTS = 3
NOW = 0.0

Key = tuple[int, int]


def scheduler(num_sessions: int, **options: Any) -> WholeSteps:
    made = WholeSteps(NUM_SEGMENTS, **options)
    for session in range(num_sessions):
        made.open(session, "client")
    return made


def run(made: WholeSteps) -> Batch:
    """One batch, from its choice to its end."""
    assert made.has_ready
    batch = made.next_batch(NOW)
    assert batch is not None
    made.done(batch, NOW)
    return batch


def run_to_end(made: WholeSteps) -> tuple[Key, ...]:
    """Who goes through all segments together, replies coming at once."""
    together = run(made).steps
    for segment in range(1, NUM_SEGMENTS):
        assert not made.has_ready
        for session, step in together:
            assert made.next_batch(NOW) is None
            made.supply(session, step, NOW)
        batch = run(made)
        assert (batch.segment, batch.steps) == (segment, together)
    return together


def test_in_lockstep_a_step_is_alone_from_its_first_segment_to_its_last() -> None:
    made = scheduler(3, max_steps=1)
    for session in (2, 0, 1):
        made.begin(session, 0, 1, NOW)
    assert [run_to_end(made) for _ in range(3)] == [((2, 0),), ((0, 0),), ((1, 0),)]
    assert not made.has_ready
    assert made.next_batch(NOW) is None


def test_whole_steps_wait_for_each_other_and_nobody_joins_them() -> None:
    made = scheduler(3)
    made.begin(0, 0, 1, NOW)
    made.begin(1, 0, 1, NOW)
    assert set(run(made).steps) == {(0, 0), (1, 0)}
    made.begin(2, 0, 1, NOW)
    made.supply(0, 0, NOW)
    assert made.next_batch(NOW) is None  # session 1 has no reply yet
    made.supply(1, 0, NOW)
    assert set(run(made).steps) == {(0, 0), (1, 0)}
    for session in (0, 1):
        made.supply(session, 0, NOW)
    assert run(made).segment == NUM_SEGMENTS - 1
    assert run_to_end(made) == ((2, 0),)


def test_rows_bound_who_enters_and_chunks_of_a_prompt_stay_in_order() -> None:
    made = scheduler(2, max_batch_rows=10)
    for step in range(4):
        made.begin(0, step, 4, NOW)
    made.begin(1, 0, 30, NOW)
    entered = [run_to_end(made) for _ in range(3)]
    assert entered == [((0, 0), (0, 1)), ((0, 2), (0, 3)), ((1, 0),)]


def test_queues_count_from_when_a_step_came_to_the_door() -> None:
    made = scheduler(1)
    made.begin(0, 0, 1, 2.0)
    batch = made.next_batch(5.0)
    assert batch is not None
    assert batch.queued_s == (3.0,)


def test_who_closes_holds_nobody_up() -> None:
    made = scheduler(4)
    for session in range(3):
        made.begin(session, 0, 1, NOW)
    running = made.next_batch(NOW)
    assert running is not None
    made.begin(3, 0, 1, NOW)
    made.close(0)  # while its step runs
    made.done(running, NOW)
    made.supply(1, 0, NOW)
    assert not made.has_ready
    made.close(2)  # while it is waited for
    assert run(made).steps == ((1, 0),)
    made.close(1)  # the last inside
    assert run_to_end(made) == ((3, 0),)
    made.begin(3, 1, 1, NOW)
    made.close(3)  # at the door
    assert not made.has_ready


@pytest.mark.parametrize("max_steps", [1, 3, None])
@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost(seed: int, max_steps: int | None) -> None:
    """Random arrivals, replies and endings: every step runs every segment once, in order."""
    chance = random.Random(seed)
    made = scheduler(6, max_steps=max_steps, max_batch_rows=8)
    next_step = [0] * 6
    closed: set[int] = set()
    waiting: list[Key] = []
    segments: dict[Key, list[int]] = {}
    ended: list[Key] = []

    def advance() -> None:
        batch = made.next_batch(NOW)
        if batch is None:
            return
        assert max_steps is None or len(batch.steps) <= max_steps
        made.done(batch, NOW)
        for key in batch.steps:
            segments[key].append(batch.segment)
            (ended if batch.segment == NUM_SEGMENTS - 1 else waiting).append(key)

    def supply() -> None:
        made.supply(*waiting.pop(chance.randrange(len(waiting))), NOW)

    for _ in range(300):
        event, session = chance.random(), chance.randrange(6)
        if event < 0.3 and session not in closed:
            segments[session, next_step[session]] = []
            made.begin(session, next_step[session], chance.choice((1, 1, 5, 12)), NOW)
            next_step[session] += 1
        elif event < 0.6 and waiting:
            supply()
        elif event > 0.995 and len(closed) < 3 and session not in closed:
            made.close(session)
            closed.add(session)
            waiting[:] = [key for key in waiting if key[0] != session]
        else:
            advance()
    while made.has_ready or waiting:
        advance() if made.has_ready else supply()
    for (session, _), seen in segments.items():
        assert seen == list(range(NUM_SEGMENTS))[: len(seen)]
        assert len(seen) == NUM_SEGMENTS or session in closed
    for session in range(6):
        steps = [step for at, step in ended if at == session]
        assert steps == sorted(steps)


class InstantEngine:
    """Takes all steps to an exchange point."""

    def advance_batch(self, steps: list[Step]) -> Any:
        return SimpleNamespace(index=1)

    def precompute_batch(self, steps: list[Step]) -> None:
        pass


async def test_a_runner_goes_on_when_who_is_waited_for_closes() -> None:
    runner = BatchRunner(cast(Engine, InstantEngine()), WholeSteps(2, max_steps=1))
    decode_step = cast(Step, SimpleNamespace(context=SimpleNamespace(num_positions=1)))
    ran: asyncio.Queue[int] = asyncio.Queue()

    def fail(error: PrivateLoRAError) -> None:
        pytest.fail(str(error))

    def begin(session: int) -> None:
        runner.open(session, "client")
        runner.begin(session, 0, decode_step, lambda step, point: ran.put_nowait(session), fail)

    begin(0)
    begin(1)
    assert await ran.get() == 0  # which now waits for its reply
    runner.close(0, [0])
    assert await asyncio.wait_for(ran.get(), 10) == 1


def test_all_schedulings_have_the_roofline_of_ours() -> None:
    rows = with_roofline(
        [
            {"sessions": n, "rtt_ms": rtt, "scheduling": way, "aggregate_tokens_per_s": rate}
            for way, factor in ((OURS, 1.0), (LOCKSTEP, 0.5), (WHOLE_STEPS, 0.8))
            for n, rtt, rate in (
                (1, 0.0, 50.0 * factor),
                (4, 0.0, 90.0 * factor),
                (1, 20.0, 10.0 * factor),
                (4, 20.0, 36.0 * factor),
            )
        ]
    )
    far = {row["scheduling"]: row for row in rows if (row["sessions"], row["rtt_ms"]) == (4, 20.0)}
    assert {row["roofline_tokens_per_s"] for row in far.values()} == {40.0}
    shares = [far[way]["vs_roofline"] for way in (OURS, LOCKSTEP, WHOLE_STEPS)]
    assert shares == pytest.approx([0.9, 0.45, 0.72])
