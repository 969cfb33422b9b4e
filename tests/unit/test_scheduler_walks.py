"""Laws of the scheduler over random orders of events, against a model that looks at everything."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from privatelora.errors import LocalProtocolError
from privatelora.runtime.scheduler import Batch, Scheduler
from privatelora.runtime.scheduling_policies import POLICIES

NUM_WALKS, NUM_EVENTS = 60, 250


@dataclass
class ModelStep:
    num_rows: int
    segment: int = 0
    is_supplied: bool = True
    is_running: bool = False


@dataclass
class Model:
    """Where every step is, and which may run: by search."""

    num_segments: int
    sessions: dict[int, dict[int, ModelStep]] = field(default_factory=dict)

    def may_run(self, session: int, number: int) -> bool:
        """Whether every earlier step has run this segment, or can in the same batch."""
        step = self.sessions[session][number]
        same_or_earlier = [
            other
            for at, other in self.sessions[session].items()
            if at <= number and other.segment <= step.segment
        ]
        return all(
            other.segment == step.segment and other.is_supplied and not other.is_running
            for other in same_or_earlier
        )

    def ready(self) -> set[tuple[int, int]]:
        return {
            (session, number)
            for session, steps in self.sessions.items()
            for number in steps
            if self.may_run(session, number)
        }

    def check_and_run(self, batch: Batch, max_batch_rows: int) -> None:
        assert batch.steps
        assert len(set(batch.steps)) == len(batch.steps)
        for session, number in batch.steps:
            # Those of the batch are run one after the other, so their order is checked too.
            step = self.sessions[session][number]
            assert step.segment == batch.segment
            assert step.is_supplied
            assert not step.is_running
            for at, earlier in self.sessions[session].items():
                in_batch_before = earlier.segment == batch.segment and earlier.is_running
                assert at >= number or earlier.segment > batch.segment or in_batch_before
                if at < number and in_batch_before:
                    place = batch.steps.index((session, at))
                    assert place < batch.steps.index((session, number))
            step.is_running = True
        num_rows = sum(self.sessions[session][number].num_rows for session, number in batch.steps)
        assert batch.num_rows == num_rows
        assert num_rows <= max_batch_rows or len(batch.steps) == 1

    def done(self, batch: Batch) -> None:
        for session, number in batch.steps:
            step = self.sessions.get(session, {}).get(number)
            if step is None:
                continue
            step.segment += 1
            step.is_supplied = step.is_running = False
            if step.segment == self.num_segments:
                del self.sessions[session][number]


class Walk:
    """Random events, legal and not; session numbers are never used twice."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.num_segments = self.chance.choice((1, 2, 3, 6))
        self.max_batch_rows = self.chance.choice((1, 4, 16, 64))
        policy = self.chance.choice(list(POLICIES.values()))
        self.scheduler = Scheduler(self.num_segments, policy, self.max_batch_rows)
        self.model = Model(self.num_segments)
        self.running: list[Batch] = []
        self.max_running = self.chance.choice((1, 1, 3))
        self.next_session = 0
        self.next_step = 0
        self.now = 0.0
        self.begun: set[tuple[int, int]] = set()
        self.runs: dict[tuple[int, int], list[int]] = {}

    def event(self) -> None:
        self.now += self.chance.random()
        weights = (1, 8, 12, 12, 10, 0.6, 1)
        match self.chance.choices(range(7), weights)[0]:
            case 0:
                if len(self.model.sessions) < 8:
                    self.scheduler.open(self.next_session, self.chance.choice("abc"))
                    self.model.sessions[self.next_session] = {}
                    self.next_session += 1
            case 1 if self.model.sessions:
                session = self.chance.choice(list(self.model.sessions))
                for _ in range(self.chance.choice((1, 1, 4))):
                    self.begin(session)
            case 2:
                self.supply()
            case 3:
                self.next_batch()
            case 4 if self.running:
                batch = self.running.pop(self.chance.randrange(len(self.running)))
                self.scheduler.done(batch, self.now)
                self.model.done(batch)
            case 5 if self.model.sessions:
                self.close(self.chance.choice(list(self.model.sessions)))
            case 6:
                self.misuse()
        assert self.scheduler.has_ready == bool(self.model.ready())

    def begin(self, session: int) -> None:
        num_rows = self.chance.choice((1, 1, 1, 5, 16, 40))
        self.scheduler.begin(session, self.next_step, num_rows, self.now)
        self.model.sessions[session][self.next_step] = ModelStep(num_rows)
        self.begun.add((session, self.next_step))
        self.next_step += self.chance.randint(1, 3)

    def waiting(self) -> list[tuple[int, int]]:
        return [
            (session, number)
            for session, steps in self.model.sessions.items()
            for number, step in steps.items()
            if not step.is_supplied
        ]

    def supply(self) -> None:
        waiting = self.waiting()
        for session, number in self.chance.sample(waiting, min(len(waiting), 3)):
            self.scheduler.supply(session, number, self.now)
            self.model.sessions[session][number].is_supplied = True

    def next_batch(self) -> None:
        if len(self.running) >= self.max_running:
            return
        ready = self.model.ready()
        batch = self.scheduler.next_batch(self.now)
        assert (batch is None) == (not ready)
        if batch is None:
            return
        assert set(batch.steps) <= ready
        self.model.check_and_run(batch, self.max_batch_rows)
        self.running.append(batch)
        for key in batch.steps:
            self.runs.setdefault(key, []).append(batch.segment)

    def close(self, session: int) -> None:
        self.scheduler.close(session)
        del self.model.sessions[session]
        self.begun = {key for key in self.begun if key[0] != session}

    def misuse(self) -> None:
        unknown = self.next_session + 1
        misuses: list[Callable[[], None]] = [
            lambda: self.scheduler.close(unknown),
            lambda: self.scheduler.begin(unknown, 0, 1, self.now),
            lambda: self.scheduler.supply(unknown, 0, self.now),
        ]
        for wrong in misuses:
            with pytest.raises(LocalProtocolError):
                wrong()
        for session, steps in self.model.sessions.items():
            for number, step in steps.items():
                with pytest.raises(LocalProtocolError):
                    self.scheduler.begin(session, number, 1, self.now)
                if step.is_supplied:
                    with pytest.raises(LocalProtocolError):
                        self.scheduler.supply(session, number, self.now)

    def drain(self) -> None:
        """Everything that was begun and not closed comes to its end."""
        for _ in range(10_000):
            while self.running:
                batch = self.running.pop()
                self.scheduler.done(batch, self.now)
                self.model.done(batch)
            self.supply()
            self.next_batch()
            if not self.running and not any(self.model.sessions.values()):
                break
        assert not any(self.model.sessions.values())
        assert not self.scheduler.has_ready
        for key in self.begun:
            assert self.runs[key] == list(range(self.num_segments))


@pytest.mark.parametrize("part", range(4))
def test_nothing_is_lost_run_twice_or_out_of_order(part: int) -> None:
    num_runs = num_closed = num_shared = 0
    for seed in range(part * NUM_WALKS, (part + 1) * NUM_WALKS):
        walk = Walk(seed)
        try:
            for _ in range(NUM_EVENTS):
                walk.event()
            walk.drain()
        except Exception as error:
            raise AssertionError(f"walk {seed}: {error}") from error
        num_runs += sum(map(len, walk.runs.values()))
        num_closed += walk.next_session - len(walk.model.sessions)
        num_shared += sum(len(runs) == walk.num_segments for runs in walk.runs.values())
    assert min(num_runs, num_closed, num_shared) > NUM_WALKS  # the walks went everywhere
