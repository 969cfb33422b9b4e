"""A long prompt as several steps in flight: what leaves when, and what is left when it fails."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from privatelora.errors import CapacityError, ConnectionClosed, RequestError
from privatelora.runtime.generation import Context
from privatelora.runtime.split_model import MAX_STEPS_IN_FLIGHT
from privatelora.runtime.wire.messages import (
    ErrorCode,
    ErrorReply,
    OpenSession,
    OutputRows,
    SessionOpened,
    StepBegin,
    StepEnd,
)
from privatelora.transports.base import Limits
from privatelora.transports.registry import listen
from tests.unit.peers import RawCloud, raw_cloud, tensor
from tests.unit.waiting import Recorder, let_run
from tests.unit.world import BOTH_BORDERS, ROOMY, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [1, *range(20, 67)]
OTHER = [1, *range(90, 120)]
ARRANGEMENTS: list[dict[str, Any]] = [
    {},
    {"every": 4},
    {"edge_first": 1},
    {"edge_last": 1},
    {"every": 3, "edge_first": 1},
    BOTH_BORDERS,
    {**BOTH_BORDERS, "every": 4},
]


async def advanced(context: Context, tokens: list[int], num_decoded: int = 3) -> torch.Tensor:
    """Logits of the last positions: prefill, then one token at a time."""
    start = len(tokens) - num_decoded
    return torch.stack(
        [await context.advance(tokens[:end]) for end in range(start, len(tokens) + 1)]
    )


def last_of(logits: torch.Tensor, num_decoded: int = 3) -> torch.Tensor:
    return logits[-1 - num_decoded :]


# What it gives


@pytest.mark.parametrize("address", ["inproc://pipelined", "tcp://127.0.0.1:0"])
@pytest.mark.parametrize("options", ARRANGEMENTS)
async def test_it_gives_what_one_step_gives(options: dict[str, Any], address: str) -> None:
    split = world(**options)
    expected = await solo(split.unsplit(), PROMPT)
    second = [*PROMPT[:9], *OTHER]
    expected_second = await solo(split.unsplit(), second)
    async with await listen(address, split.service().handle, Limits()) as listener:
        for size in (1, 5, 16):
            model = split.split(listener.address, max_step_positions=size)
            context = await Context.open(model)
            assert_same(await advanced(context, PROMPT), last_of(expected))
            assert_same(await advanced(context, second), last_of(expected_second))
            await model.aclose()


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
async def test_it_gives_what_one_step_gives_in_other_families(family: str) -> None:
    split = world(family, **BOTH_BORDERS)
    expected = await solo(split.unsplit(), PROMPT)
    async with serving(split.service().handle) as address:
        model = split.split(address, max_step_positions=7)
        assert_same(await advanced(await Context.open(model), PROMPT), last_of(expected))
        await model.aclose()


async def test_chunks_leave_together_but_not_too_many() -> None:
    num_chunks = MAX_STEPS_IN_FLIGHT + 3
    prompt = [*range(3, 3 + 2 * num_chunks)]
    heard: list[StepBegin] = []

    async def watch(cloud: RawCloud) -> None:
        await cloud.hear(OpenSession)
        await cloud.say(SessionOpened(0, 128))
        heard.extend([await cloud.hear(StepBegin) for _ in range(MAX_STEPS_IN_FLIGHT)])
        for ended in range(num_chunks):
            await let_run(20)
            assert cloud.connection.recv_nowait() is None
            rows = 1 if ended == num_chunks - 1 else 0
            await cloud.say(StepEnd(0, heard[ended].step_id, tensor(rows, 64)))
            if len(heard) < num_chunks:
                heard.append(await cloud.hear(StepBegin))
        await cloud.listen_on()

    split = world()
    assert split.config.hidden_size == 64
    async with serving(raw_cloud(watch)) as address:
        model = split.split(address, max_step_positions=2)
        context = await Context.open(model)
        await context.advance(prompt)
        assert context.token_ids == prompt
        await model.aclose()
    assert [begin.position for begin in heard] == [*range(0, 2 * num_chunks, 2)]
    wanted = [begin.output_rows for begin in heard]
    assert wanted == [OutputRows.NONE] * (num_chunks - 1) + [OutputRows.LAST]


# When it is cut off


@pytest.mark.parametrize("options", ARRANGEMENTS)
async def test_it_may_be_cancelled_anywhere(options: dict[str, Any]) -> None:
    split = world(**options)
    third = [*PROMPT[:11], *OTHER[:13]]
    expected, expected_third = [await solo(split.unsplit(), p) for p in (PROMPT, third)]
    choice = random.Random(str(options))
    async with serving(split.service().handle) as address:
        model = split.split(address, max_step_positions=6)
        context = await Context.open(model)
        for num_turns in [*range(8), *choice.sample(range(8, 120), 12)]:
            for _ in range(choice.randrange(1, 3)):
                task = asyncio.create_task(
                    context.advance([*OTHER[: choice.randrange(9)], *PROMPT])
                )
                await let_run(num_turns)
                task.cancel()
                await asyncio.wait({task})
            tokens, logits = choice.choice([(PROMPT, expected), (third, expected_third)])
            assert_same(await advanced(context, tokens), last_of(logits))
            assert context.token_ids == tokens
        await model.aclose()


async def test_what_had_ended_when_it_was_cancelled_is_kept() -> None:
    async def end_two(cloud: RawCloud) -> None:
        await cloud.hear(OpenSession)
        await cloud.say(SessionOpened(0, 128))
        begun = [await cloud.hear(StepBegin) for _ in range(4)]
        for begin in begun[:2]:
            await cloud.say(StepEnd(0, begin.step_id, tensor(0, 64)))
        await let_run(20)
        for begin in begun[2:]:
            rows = int(begin is begun[-1])
            await cloud.say(StepEnd(0, begin.step_id, tensor(rows, 64)))
        again = await cloud.hear(StepBegin)
        assert (again.position, again.hidden_states.shape[0]) == (8, 4)
        await cloud.say(ErrorReply(ErrorCode.CAPACITY, "seen", 0))
        await cloud.listen_on()

    split = world()
    async with serving(raw_cloud(end_two)) as address:
        model = split.split(address, max_step_positions=4)
        context = await Context.open(model)
        task = asyncio.create_task(context.advance(PROMPT[:15]))
        async with asyncio.timeout(5):
            while len(context.token_ids) < 8:  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert context.token_ids == PROMPT[:8]
        with pytest.raises(CapacityError, match="seen"):
            await context.advance(PROMPT[:15])
        await model.aclose()


async def test_a_chunk_that_cannot_be_run_fails_the_whole_once() -> None:
    split = world()
    expected = await solo(split.unsplit(), PROMPT)
    async with serving(split.service().handle) as address:
        model = split.split(address, max_step_positions=4)
        context = await Context.open(model)
        for index in (0, 7, 30, len(PROMPT) - 1):
            broken = [*PROMPT]
            broken[index] = 10**6
            with pytest.raises(RequestError, match="token ids must lie in"):
                await context.advance(broken)
            assert context.token_ids == PROMPT[: len(context.token_ids)]
            assert_same(await advanced(context, PROMPT), last_of(expected))
        await model.aclose()


async def test_the_cloud_may_fail_it_in_the_middle() -> None:
    async def end_one_and_give_up(cloud: RawCloud) -> None:
        for session_id in range(2):
            await cloud.hear(OpenSession)
            await cloud.say(SessionOpened(session_id, 128))
        begun = [await cloud.hear(StepBegin) for _ in range(3)]
        await cloud.say(StepEnd(0, begun[0].step_id, tensor(0, 64)))
        await let_run(20)
        await cloud.say(ErrorReply(ErrorCode.CAPACITY, "no more", 0))
        again = await cloud.hear(OpenSession)
        await cloud.say(ErrorReply(ErrorCode.CAPACITY, "not yet", again.session_id))
        begin = await cloud.hear(StepBegin)
        await cloud.say(StepEnd(1, begin.step_id, tensor(1, 64)))
        await cloud.listen_on()

    split = world()
    async with serving(raw_cloud(end_one_and_give_up)) as address:
        model = split.split(address, max_step_positions=4)
        context, other = await Context.open(model), await Context.open(model)
        with pytest.raises(CapacityError, match="no more"):
            await context.advance(PROMPT[:12])
        assert context.token_ids == PROMPT[:4]
        with pytest.raises(CapacityError, match="not yet"):  # it is over, but a new one may do
            await context.advance(PROMPT[:12])
        await context.aclose()
        await other.advance([5])
        await model.aclose()


@pytest.mark.parametrize("options", [{}, BOTH_BORDERS])
async def test_the_link_may_be_lost_anywhere(options: dict[str, Any]) -> None:
    split = world(**options)
    expected = await solo(split.unsplit(), PROMPT)
    recorder = Recorder(split.service(replace(ROOMY, max_sessions=1)).handle)
    async with serving(recorder) as address:
        model = split.split(address, max_step_positions=6)
        for num_turns in [0, 1, 2, 3, 5, 8, 13, 21, 34, 55]:
            context = await Context.open(model)
            task = asyncio.create_task(context.advance(PROMPT))
            await let_run(num_turns)
            recorder.connections[-1].abort()
            await asyncio.wait({task})
            if task.exception() is None:
                assert_same(task.result(), expected[-1])
            else:
                assert isinstance(task.exception(), ConnectionClosed)
            assert_same(await context.advance(PROMPT), expected[-1])
            await context.aclose()
        await model.aclose()


async def test_closing_ends_all_that_is_in_flight() -> None:
    split = world()
    async with serving(split.service().handle) as address:
        model = split.split(address, max_step_positions=4)
        context, other = await Context.open(model), await Context.open(model)
        task = asyncio.create_task(context.advance(PROMPT))
        await let_run(6)
        await context.aclose()
        with pytest.raises(ConnectionClosed, match=r"sequence (was|is) closed"):
            await task
        expected = await solo(split.unsplit(), PROMPT)
        assert_same(await other.advance(PROMPT), expected[-1])
        await model.aclose()
