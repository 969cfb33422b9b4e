"""The cloud's scheduler, by example. ``test_scheduler_walks`` has its laws."""

from __future__ import annotations

import gc
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from privatelora.errors import LocalProtocolError
from privatelora.runtime.scheduler import BATCH_OVERHEAD_ROWS, SLACK_TOKENS, Batch, Scheduler
from privatelora.runtime.scheduling_policies import (
    POLICIES,
    Policy,
    ReadySegment,
    fullest,
    laggards_first,
    oldest,
)

NOW = 0.0


def scheduler(
    *clients: str, num_segments: int = 3, policy: Policy = laggards_first, max_batch_rows: int = 16
) -> Scheduler:
    """With session 0, 1, ... of these clients."""
    made = Scheduler(num_segments, policy, max_batch_rows)
    for session, client in enumerate(clients):
        made.open(session, client)
    return made


def run(made: Scheduler, now: float = NOW) -> Batch:
    """One batch, from its choice to its end."""
    batch = made.next_batch(now)
    assert batch is not None
    made.done(batch, now)
    return batch


def bring_to(made: Scheduler, segment: int, *steps: tuple[int, int]) -> None:
    """Begin steps of one row, alone in ``made``, and bring them to ``segment``, waiting there."""
    for session, step in steps:
        made.begin(session, step, 1, NOW)
    for at in range(segment):
        assert run(made).steps == steps
        if at + 1 < segment:
            for session, step in steps:
                made.supply(session, step, NOW)
    assert made.next_batch(NOW) is None


def test_a_step_runs_segment_by_segment_and_waits_before_each() -> None:
    made = scheduler("a")
    made.begin(0, 7, 5, NOW)
    for segment in range(3):
        batch = run(made)
        assert (batch.segment, batch.steps, batch.num_rows) == (segment, ((0, 7),), 5)
        assert made.next_batch(NOW) is None
        assert not made.has_ready
        if segment < 2:
            made.supply(0, 7, NOW)
            assert made.has_ready
    with pytest.raises(LocalProtocolError, match="does not wait"):
        made.supply(0, 7, NOW)  # it is over


def test_steps_of_several_sessions_and_sizes_share_a_batch() -> None:
    made = scheduler("a", "b", "c")
    made.begin(0, 0, 1, 1.0)
    made.begin(1, 0, 10, 2.0)
    made.begin(2, 0, 1, 3.0)
    batch = run(made, 5.0)
    assert sorted(batch.steps) == [(0, 0), (1, 0), (2, 0)]
    assert batch.num_rows == 12
    assert sorted(batch.queued_s) == [2.0, 3.0, 4.0]


def test_steps_of_a_session_share_a_batch_in_order() -> None:
    made = scheduler("a")
    for step, num_rows in ((3, 6), (5, 6), (9, 4), (11, 1)):
        made.begin(0, step, num_rows, NOW)
    assert run(made).steps == ((0, 3), (0, 5), (0, 9))
    assert run(made).steps == ((0, 11),)


def test_a_step_waits_until_the_one_before_it_is_ready_too() -> None:
    made = scheduler("a")
    bring_to(made, 1, (0, 0), (0, 1), (0, 2))
    made.supply(0, 2, NOW)
    made.supply(0, 1, NOW)
    assert made.next_batch(NOW) is None
    made.supply(0, 0, NOW)
    assert run(made).steps == ((0, 0), (0, 1), (0, 2))


def test_a_step_waits_while_the_one_before_it_runs() -> None:
    made = scheduler("a")
    made.begin(0, 0, 16, NOW)
    made.begin(0, 1, 1, NOW)
    first = made.next_batch(NOW)
    assert first is not None
    assert first.steps == ((0, 0),)
    assert made.next_batch(NOW) is None
    made.done(first, NOW)
    assert run(made).steps == ((0, 1),)


def test_two_batches_may_run_at_once() -> None:
    made = scheduler("a", "b")
    bring_to(made, 1, (0, 0))
    made.supply(0, 0, NOW)
    made.begin(1, 0, 1, NOW)
    batches = [made.next_batch(NOW), made.next_batch(NOW)]
    for batch in batches:
        assert batch is not None
        made.done(batch, NOW)
    assert {batch.segment for batch in batches if batch is not None} == {0, 1}


def test_a_step_above_the_budget_runs_alone() -> None:
    made = scheduler("a", "b", "c")
    made.begin(0, 0, 1, NOW)
    made.begin(1, 0, 17, NOW)
    made.begin(2, 0, 1, NOW)
    batches = [run(made).steps, run(made).steps]
    assert sorted(batches, key=len) == [((1, 0),), ((0, 0), (2, 0))]


def test_smaller_steps_fill_what_a_large_one_leaves() -> None:
    made = scheduler("a", "b", "c")
    made.begin(0, 0, 10, NOW)
    made.begin(1, 0, 10, NOW)
    made.begin(2, 0, 6, NOW)
    assert run(made).steps == ((0, 0), (2, 0))
    assert run(made).steps == ((1, 0),)


def test_a_closed_session_leaves_a_running_batch() -> None:
    made = scheduler("a", "b")
    made.begin(0, 0, 1, NOW)
    made.begin(1, 0, 1, NOW)
    batch = made.next_batch(NOW)
    assert batch is not None
    made.close(0)
    made.open(0, "c")  # even if the number were used again
    made.begin(0, 0, 1, NOW)
    made.done(batch, NOW)
    made.supply(1, 0, NOW)
    assert {run(made).steps, run(made).steps} == {((0, 0),), ((1, 0),)}


def test_a_failed_batch_is_forgotten_with_its_sessions() -> None:
    made = scheduler("a", "b")
    made.begin(0, 0, 1, NOW)
    assert made.next_batch(NOW) is not None
    made.close(0)
    made.begin(1, 0, 1, NOW)
    assert run(made).steps == ((1, 0),)


def test_misuse_is_refused_and_changes_nothing() -> None:
    made = scheduler("a")
    made.begin(0, 4, 1, NOW)
    misuses: list[tuple[Callable[[], None], str]] = [
        (lambda: made.open(0, "a"), "session 0 is open already"),
        (lambda: made.close(1), "session 1 is not open"),
        (lambda: made.begin(1, 0, 1, NOW), "session 1 is not open"),
        (lambda: made.begin(0, 4, 1, NOW), "step 4 cannot begin after step 4"),
        (lambda: made.begin(0, 3, 1, NOW), "step 3 cannot begin after step 4"),
        (lambda: made.begin(0, 5, 0, NOW), "step 5 has 0 rows"),
        (lambda: made.supply(0, 4, NOW), "step 4 does not wait for a reply"),
        (lambda: made.supply(0, 5, NOW), "step 5 does not wait for a reply"),
        (lambda: made.supply(1, 0, NOW), "session 1 is not open"),
    ]
    for wrong, said in misuses:
        with pytest.raises(LocalProtocolError, match=said):
            wrong()
    batch = run(made)
    assert batch.steps == ((0, 4),)
    with pytest.raises(LocalProtocolError, match="is done already"):
        made.done(batch, NOW)
    made.supply(0, 4, NOW)
    with pytest.raises(LocalProtocolError, match="does not wait"):
        made.supply(0, 4, NOW)
    assert run(made).segment == 1


@pytest.mark.parametrize(
    ("policy", "segments"),
    [(oldest, [2, 0, 1]), (fullest, [1, 0, 2]), (laggards_first, [0, 1, 2])],
)
def test_policies_choose_the_segment(policy: Policy, segments: list[int]) -> None:
    made = scheduler(*"abcd", policy=policy)
    bring_to(made, 2, (0, 0))
    bring_to(made, 1, (1, 0), (2, 0))
    made.supply(0, 0, 1.0)
    made.begin(3, 0, 1, 2.0)
    made.supply(1, 0, 3.0)
    made.supply(2, 0, 4.0)
    assert [run(made, 5.0).segment for _ in range(3)] == segments


def test_decode_steps_do_not_wait_for_chunks_of_other_segments() -> None:
    made = scheduler("a", "b")
    bring_to(made, 1, (0, 0))
    made.begin(1, 0, BATCH_OVERHEAD_ROWS + 1, NOW)
    made.supply(0, 0, NOW)
    assert [run(made).segment, run(made).segment] == [1, 0]


def saturate(
    made: Scheduler,
    work: dict[int, int],
    num_batches: int,
    segments_of_a_step: int = 1,
    first_step: int = 0,
) -> Counter[int]:
    """Rows that each session got if it always has two steps, of ``work`` rows, under way."""
    numbers = itertools.count(first_step)
    for session, num_rows in [*work.items(), *work.items()]:
        made.begin(session, next(numbers), num_rows, NOW)
    served: Counter[int] = Counter()
    for _ in range(num_batches):
        batch = run(made)
        for session, step in batch.steps:
            served[session] += work[session]
            if batch.segment == segments_of_a_step - 1:
                made.begin(session, next(numbers), work[session], NOW)
            else:
                made.supply(session, step, NOW)
    return served


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_clients_get_equal_shares_however_many_sessions_they_have(policy: Policy) -> None:
    made = scheduler(*"aaaaaaaaab", num_segments=4, policy=policy, max_batch_rows=1)
    served = saturate(made, dict.fromkeys(range(10), 1), 4000, segments_of_a_step=4)
    assert abs(served[9] / 4000 - 0.5) < 0.05
    assert all(abs(served[session] / 4000 - 0.5 / 9) < 0.02 for session in range(9))


def test_a_client_that_prefills_gets_as_much_time_as_one_that_decodes() -> None:
    made = scheduler("a", "b", num_segments=1)
    served = saturate(made, {0: 64, 1: 1}, 3000)
    times = {session: served[session] / rows * (rows + 8) for session, rows in ((0, 64), (1, 1))}
    assert 0.9 < times[0] / times[1] < 1.1


def test_nobody_saves_up_time_by_being_away() -> None:
    made = scheduler("a", "b", num_segments=1, max_batch_rows=1)
    saturate(made, {0: 1}, 1000)
    served = saturate(made, {0: 1, 1: 1}, 200, first_step=10_000)
    slack = SLACK_TOKENS * 1
    assert abs(served[1] - served[0]) <= 2 * slack + 2


def test_sessions_that_closed_do_not_count() -> None:
    """However they ended: while a step was ready, or in the last batch of its own."""
    made = scheduler("a", "b", num_segments=1, max_batch_rows=1)
    for session in range(2, 40):
        made.open(session, "a")
        made.begin(session, 0, 1, NOW)
        batch = made.next_batch(NOW) if session % 2 else None
        made.close(session)
        if batch is not None:
            made.done(batch, NOW)
    served = saturate(made, {0: 1, 1: 1}, 1000)
    assert abs(served[0] - served[1]) < 50


def test_nothing_is_kept_of_what_is_over() -> None:
    def num_objects() -> int:
        gc.collect()
        module = Scheduler.__module__
        return sum(type(each).__module__ == module for each in gc.get_objects())

    made = scheduler("a", num_segments=1, max_batch_rows=1)
    saturate(made, {0: 1}, 1)  # two steps that overlap, always
    before = num_objects()
    saturate(made, {0: 1}, 200, first_step=10)  # two more that overlap
    assert num_objects() == before + 2
    made.close(0)
    made.open(0, "a")
    for session in range(1, 50):
        made.open(session, f"client {session}")
        made.begin(session, 0, 1, NOW)
        made.close(session)
        saturate(made, {0: 1}, 4, first_step=100 * session)
        assert made.next_batch(NOW) is not None  # never done: it failed
        made.close(0)
        made.open(0, "a")
        saturate(made, {0: 1}, 1)
    assert num_objects() <= before


@pytest.mark.parametrize("seed", range(6))
def test_a_due_step_runs_within_the_stated_bound_under_any_policy(seed: int) -> None:
    """Against a policy that avoids the victim for as long as it can."""
    num_segments, chance = 4, random.Random(seed)
    victim_segment = 0

    def adversary(due: Sequence[ReadySegment]) -> int:
        others = [ready.segment for ready in due if ready.segment != victim_segment]
        return chance.choice(others or [victim_segment])

    clients = [chance.choice("abc") for _ in range(12)]
    max_batch_rows = chance.choice((1, 16))
    made = scheduler(
        *clients,
        "victim",
        num_segments=num_segments,
        policy=adversary,
        max_batch_rows=max_batch_rows,
    )
    victim = len(clients)
    rows = [chance.choice((1, 1, 1, 12)) for _ in clients]
    numbers = itertools.count()
    for session, num_rows in [*enumerate(rows), *enumerate(rows)]:  # so that none is ever idle
        made.begin(session, next(numbers), num_rows, NOW)
    made.begin(victim, next(numbers), 1, NOW)
    waited, bound, num_ready, longest = 0, len(clients) * 100, 2 * len(clients), 0
    for _ in range(4000):
        batch = run(made)
        num_ready -= len(batch.steps)
        waited += 1
        for session, step in batch.steps:
            is_last = batch.segment == num_segments - 1
            if session == victim:
                assert waited <= bound
                longest, waited = max(longest, waited), 0
                victim_segment = 0 if is_last else batch.segment + 1
                bound = 1 + num_ready + len(clients) * (SLACK_TOKENS * num_segments + 1)
            if is_last:
                made.begin(session, next(numbers), 1 if session == victim else rows[session], NOW)
            else:
                made.supply(session, step, NOW)
            num_ready += 1
    assert waited <= bound
    assert longest > 2  # the adversary did try
