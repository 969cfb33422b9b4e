"""Training gets the engine in slices, and never holds up a conversation for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import Any, cast

import pytest
import torch

from privatelora.errors import CapacityError, PrivateLoRAError
from privatelora.partition.plan import ExchangePoint
from privatelora.runtime.batch_runner import BatchRunner
from privatelora.runtime.training_engine import Exchange
from privatelora.runtime.training_runner import TURNS, TrainingPass, TrainingRunner
from tests.unit.waiting import let_run, settled
from tests.unit.world import CPU

pytestmark = pytest.mark.usefixtures("nothing_leaks")

ASKED = Exchange(ExchangePoint(0, (0,)), torch.zeros(1, 1))
ANSWER = torch.ones(1, 1)


class Conversations:
    """As a runner of conversations looks from here."""

    is_due = False
    is_busy = False


class Passes:
    """Passes through one runner, and what became of each slice of them."""

    def __init__(self) -> None:
        self.conversations = Conversations()
        self.runner = TrainingRunner(cast(BatchRunner, self.conversations), CPU)
        self.slices: list[str] = []
        """Of which pass each was, in the order in which they ran."""
        self.times: list[tuple[float, float]] = []
        """When each began and ended."""
        self.finished: dict[str, Any] = {}
        self.asked: dict[str, Exchange] = {}
        self.failures: dict[str, PrivateLoRAError] = {}

    def begin(self, name: str, work: Generator[Exchange | None, Any, Any]) -> TrainingPass:
        one = TrainingPass(
            work,
            lambda result: self.finished.update({name: result}),
            lambda exchange: self.asked.update({name: exchange}),
            lambda error: self.failures.update({name: error}),
        )
        self.runner.run(one)
        return one

    def work(
        self, name: str, num_slices: int, slice_s: float = 0.0
    ) -> Generator[Exchange | None, Any, str]:
        for _ in range(num_slices):
            started = time.monotonic()
            time.sleep(slice_s)  # computing
            self.slices.append(name)
            self.times.append((started, time.monotonic()))
            yield None
        return f"{name} is done"


async def test_a_pass_comes_to_its_end_in_turns_with_everybody_else() -> None:
    """And in no more of them, where nobody else needs the engine."""
    passes = Passes()
    passes.begin("a", passes.work("a", 5))
    assert passes.slices == [], "whoever begins it has a turn first"
    num_turns = 0
    while "a" not in passes.finished:
        num_turns += 1
        await asyncio.sleep(0)
    assert passes.finished == {"a": "a is done"}
    assert 5 * (TURNS + 1) <= num_turns <= 6 * (TURNS + 1)


async def test_trainers_take_turns() -> None:
    passes = Passes()
    passes.begin("a", passes.work("a", 6))
    passes.begin("b", passes.work("b", 3))
    await settled(lambda: len(passes.finished) == 2)
    assert "".join(passes.slices) == "abababaaa"


async def test_a_pass_that_asks_goes_on_with_its_answer() -> None:
    passes = Passes()

    def work() -> Generator[Exchange | None, Any, Any]:
        answer = yield ASKED
        yield None
        return answer

    one = passes.begin("a", work())
    await settled(lambda: "a" in passes.asked)
    assert passes.asked == {"a": ASKED}
    assert one.is_waiting
    await let_run(20)
    assert passes.finished == {}
    passes.runner.run(one, ANSWER)
    assert not one.is_waiting
    await settled(lambda: "a" in passes.finished)
    assert passes.finished == {"a": ANSWER}


async def test_a_batch_of_conversations_that_is_due_goes_first() -> None:
    passes = Passes()
    passes.conversations.is_due = True
    passes.begin("a", passes.work("a", 3))
    await let_run(50)
    assert passes.slices == []
    passes.conversations.is_due = False
    await settled(lambda: "a" in passes.finished)


async def test_between_two_slices_a_frame_is_read_answered_and_run() -> None:
    """A conversation gets its turn after every slice, though it is due only in the third turn."""
    passes = Passes()
    passes.begin("a", passes.work("a", 4))
    await settled(lambda: len(passes.slices) == 1)
    await let_run(TURNS - 1)
    passes.conversations.is_due = True
    await let_run(50)
    assert len(passes.slices) == 1
    passes.conversations.is_due = False
    await settled(lambda: "a" in passes.finished)


async def test_it_takes_at_most_half_of_the_time_of_a_busy_engine() -> None:
    passes = Passes()
    passes.conversations.is_busy = True
    passes.begin("a", passes.work("a", 3, slice_s=0.01))
    passes.begin("b", passes.work("b", 3, slice_s=0.002))
    await settled(lambda: len(passes.finished) == 2)
    for (started, ended), (next_started, _) in zip(passes.times, passes.times[1:], strict=False):
        assert next_started - ended >= 0.99 * (ended - started)


async def test_a_pass_that_is_closed_runs_no_more_and_the_next_goes_on() -> None:
    passes = Passes()
    gone = passes.begin("a", passes.work("a", 100))
    passes.begin("b", passes.work("b", 3))
    await settled(lambda: len(passes.slices) == 2)
    gone.close()
    await settled(lambda: "b" in passes.finished)
    await let_run(20)
    assert passes.slices.count("a") == 1
    assert set(passes.finished) == {"b"}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("out of memory"), CapacityError, "out of memory; train with smaller batches"),
        (MemoryError("none left"), CapacityError, "none left; train with smaller batches"),
        (KeyError("defect"), PrivateLoRAError, "a training step failed: 'defect'"),
    ],
)
async def test_a_pass_that_fails_says_why_and_the_next_goes_on(
    error: Exception, kind: type[PrivateLoRAError], message: str
) -> None:
    passes = Passes()

    def fail() -> Generator[Exchange | None, Any, Any]:
        yield None
        raise error

    passes.begin("a", fail())
    passes.begin("b", passes.work("b", 3))
    await settled(lambda: "b" in passes.finished)
    failure = passes.failures["a"]
    assert type(failure) is kind
    assert message in str(failure)
    assert set(passes.finished) == {"b"}
