"""Several steps of one session in flight, as chunked prefill over a long link will send them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from privatelora.runtime.wire.messages import (
    ErrorCode,
    ExchangeRequest,
    StepEnd,
)
from tests.unit.peers import RawEdge, raw_edge
from tests.unit.world import assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

TOKENS = [1, *range(20, 49)]
CUTS = [0, 12, 13, 30]
NUM_STEPS = len(CUTS) - 1


async def begin_all(edge: RawEdge, session_id: int = 0) -> dict[int, ExchangeRequest]:
    """Send every chunk at once; what the cloud asks for each."""
    await edge.say(
        *(
            edge.begin(
                session_id, step_id, CUTS[step_id], TOKENS[CUTS[step_id] : CUTS[step_id + 1]]
            )
            for step_id in range(NUM_STEPS)
        )
    )
    requests = [await edge.hear(ExchangeRequest) for _ in range(NUM_STEPS)]
    return {request.step_id: request for request in requests}


def may_answer(step_id: int, asked: dict[int, ExchangeRequest]) -> bool:
    """No step may come to a layer before those ahead of it have been there."""
    return all(
        asked[earlier].point > asked[step_id].point for earlier in asked if earlier < step_id
    )


async def run_all(edge: RawEdge, asked: dict[int, ExchangeRequest], seed: int) -> torch.Tensor:
    """Answer in some order that is allowed; the logits of all positions."""
    choice = random.Random(seed)
    ends: dict[int, StepEnd] = {}
    while asked:
        step_id = choice.choice([step_id for step_id in asked if may_answer(step_id, asked)])
        await edge.say(edge.answer(asked.pop(step_id)))
        message: Any = await edge.hear(object)
        assert message.step_id == step_id
        if isinstance(message, StepEnd):
            ends[step_id] = message
        else:
            asked[step_id] = message
    return torch.cat([edge.logits(ends[i].hidden_states) for i in range(NUM_STEPS)])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral"])
async def test_they_give_what_one_after_the_other_gives(family: str, every: int) -> None:
    split = world(family, every=every)
    expected = await solo(split.unsplit(), TOKENS)
    async with serving(split.service().handle) as address, raw_edge(split, address) as edge:
        for seed in range(8):
            await edge.open(seed)
            asked = await begin_all(edge, seed)
            assert_same(await run_all(edge, asked, seed), expected)


async def test_a_reply_that_comes_early_waits_for_the_steps_ahead() -> None:
    split = world()
    expected = await solo(split.unsplit(), TOKENS)
    async with serving(split.service().handle) as address, raw_edge(split, address) as edge:
        await edge.open(0)
        asked = await begin_all(edge)
        assert not may_answer(1, asked)
        last, middle, first = (edge.answer(asked[step_id]) for step_id in (2, 1, 0))
        await edge.say(last, middle, first)
        asked = {}
        for _ in range(NUM_STEPS):
            request = await edge.hear(ExchangeRequest)
            asked[request.step_id] = request
        assert list(asked) == [0, 1, 2]
        assert_same(await run_all(edge, asked, seed=0), expected)


@pytest.mark.parametrize("position", [0, 29, 31])
async def test_only_the_next_position_may_follow_steps_in_flight(position: int) -> None:
    split = world()
    async with serving(split.service().handle) as address, raw_edge(split, address) as edge:
        await edge.open(0)
        await begin_all(edge)
        await edge.say(edge.begin(0, NUM_STEPS, position, [7]))
        error = await edge.hear_error()
    assert (error.code, error.session_id) == (ErrorCode.PROTOCOL, None)
    assert f"position {position} of a sequence of 30 with steps in flight" in error.message


async def test_once_they_have_ended_an_earlier_position_may_follow() -> None:
    split = world()
    expected = await solo(split.unsplit(), [*TOKENS[:5], 150])
    async with serving(split.service().handle) as address, raw_edge(split, address) as edge:
        await edge.open(0)
        await run_all(edge, await begin_all(edge), seed=0)
        await edge.say(edge.begin(0, NUM_STEPS, 5, [150]))
        for _ in split.plan.wire_points:
            await edge.say(edge.answer(await edge.hear(ExchangeRequest)))
        end = await edge.hear(StepEnd)
        assert_same(edge.logits(end.hidden_states), expected[-1:])
