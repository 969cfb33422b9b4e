"""Cloud and edge together: sharing, cancelling, ending, and losing each other."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from privatelora.errors import ConnectionClosed
from privatelora.runtime.language_model import Sequence
from privatelora.runtime.split_model import SplitModel
from privatelora.runtime.wire.messages import OpenSession, SessionOpened, StepBegin, StepEnd
from privatelora.transports.base import Limits
from tests.unit.peers import RawCloud, raw_cloud, tensor
from tests.unit.waiting import Recorder, let_run, settled
from tests.unit.world import BOTH_BORDERS, ROOMY, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [1, *range(20, 42)]
OTHER = [1, *range(90, 120)]
ARRANGEMENTS: list[dict[str, Any]] = [
    {},
    {"every": 4},
    BOTH_BORDERS,
    {**BOTH_BORDERS, "every": 4},
]


async def decode(sequence: Sequence, tokens: list[int], start: int) -> torch.Tensor:
    """Run ``tokens`` up to ``start`` at once and then one at a time; all logits."""
    logits = [await sequence.forward(tokens[:start], 0, "all")]
    logits += [
        await sequence.forward([tokens[position]], position, "last")
        for position in range(start, len(tokens))
    ]
    return torch.cat(logits)


# Sharing


@pytest.mark.parametrize("options", ARRANGEMENTS)
async def test_sequences_and_edges_at_once_do_not_disturb_each_other(
    options: dict[str, Any],
) -> None:
    split = world(**options)
    prompts = [PROMPT, OTHER, [*PROMPT[:9], 150], OTHER[::-1], PROMPT[5:], [7, 8]]
    expected = [await solo(split.unsplit(), prompt) for prompt in prompts]
    recorder = Recorder(split.service().handle)

    async def run(model: SplitModel, prompt: list[int]) -> torch.Tensor:
        sequence = await model.open_sequence(len(prompt))
        try:
            return await decode(sequence, prompt, len(prompt) // 2)
        finally:
            await sequence.aclose()

    async with serving(recorder) as address:
        edges = [split.split(address) for _ in range(2)]
        # All of them start at once: each edge connects once nevertheless.
        found = await asyncio.gather(
            *(run(edges[i % 2], prompt) for i, prompt in enumerate(prompts))
        )
        for edge in edges:
            await edge.aclose()
    assert len(recorder.connections) == 2
    for logits, alone in zip(found, expected, strict=True):
        assert_same(logits, alone)


async def test_traffic_is_counted_per_sequence() -> None:
    split = world()
    num_points = len(split.plan.wire_points)
    async with serving(split.service().handle) as address:
        model = split.split(address)
        busy, idle = await model.open_sequence(64), await model.open_sequence(64)
        before = replace(busy.traffic)
        await busy.forward(PROMPT, 0, "none")
        prefill, start = busy.traffic.since(before), replace(busy.traffic)
        await busy.forward([5], len(PROMPT), "last")
        step = busy.traffic.since(start)
        assert prefill.round_trips == step.round_trips == 1 + num_points
        config, plan = split.config, split.plan
        numbers_up = config.hidden_size + (1 + num_points) * plan.y_size
        numbers_down = config.hidden_size + num_points * plan.z_size
        # Each message has a header as well.
        assert 0 <= step.sent_nbytes - 4 * numbers_up <= 128 * (1 + num_points)
        assert 0 <= step.received_nbytes - 4 * numbers_down <= 128 * (1 + num_points)
        assert prefill.sent_nbytes > (len(PROMPT) - 1) * 4 * numbers_up
        assert idle.traffic == before
        await model.aclose()


# Cancelling


@pytest.mark.parametrize("options", ARRANGEMENTS)
async def test_a_step_may_be_cancelled_anywhere(options: dict[str, Any]) -> None:
    split = world(**options)
    expected = await solo(split.unsplit(), PROMPT)
    num_cancelled = 0
    async with serving(split.service().handle) as address:
        model = split.split(address)
        ended = False
        while not ended:
            sequence = await model.open_sequence(64)
            await sequence.forward(PROMPT[:4], 0, "none")
            task = asyncio.create_task(sequence.forward(OTHER, 4, "last"))
            await let_run(num_cancelled)
            ended = task.done()
            task.cancel()
            await asyncio.wait({task})
            # Fewer rows than in the step that still goes on over there, and one at a time.
            assert_same(await sequence.forward(PROMPT[4:9], 4, "all"), expected[4:9])
            for position in range(9, len(PROMPT)):
                logits = await sequence.forward([PROMPT[position]], position, "last")
                assert_same(logits, expected[position : position + 1])
            await sequence.aclose()
            num_cancelled += 1
        await model.aclose()
    assert num_cancelled > 3 + len(split.plan.wire_points)


async def test_waiting_for_a_cancelled_step_may_be_cancelled_too() -> None:
    split = world()
    expected = await solo(split.unsplit(), PROMPT)
    async with serving(split.service().handle) as address:
        model = split.split(address)
        for num_turns in range(12):
            sequence = await model.open_sequence(64)
            for tokens, turns in [(OTHER, 2), (OTHER[:7], num_turns), (OTHER[:3], 1)]:
                task = asyncio.create_task(sequence.forward(tokens, 0, "last"))
                await let_run(turns)
                task.cancel()
                await asyncio.wait({task})
            assert_same(await sequence.forward(PROMPT, 0, "all"), expected)
            await sequence.aclose()
        await model.aclose()


async def test_opening_may_be_cancelled_anywhere() -> None:
    split = world()
    limits = replace(ROOMY, max_sessions=1)
    async with serving(split.service(limits).handle) as address:
        for num_turns in range(16):
            model = split.split(address)
            task = asyncio.create_task(model.open_sequence(8))
            await let_run(num_turns)
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                await task.result().aclose()
            # The only session there is was not lost.
            sequence = await model.open_sequence(8)
            await sequence.aclose()
            await model.aclose()


async def test_a_cancelled_step_leaves_no_complaint_when_everything_ends() -> None:
    split = world()
    async with serving(split.service().handle) as address:
        for close_first in (True, False):
            model = split.split(address)
            sequence = await model.open_sequence(64)
            task = asyncio.create_task(sequence.forward(OTHER, 0, "last"))
            await let_run(3)
            task.cancel()
            await asyncio.wait({task})
            if close_first:
                await sequence.aclose()
            await model.aclose()


async def test_a_message_goes_out_though_its_caller_has_gone() -> None:
    split = world()
    listening = asyncio.Event()

    async def deaf_for_a_while(cloud: RawCloud) -> None:
        for session_id in range(2):
            await cloud.hear(OpenSession)
            await cloud.say(SessionOpened(session_id, 64))
        await listening.wait()
        for _ in range(2):
            begun = await cloud.hear(StepBegin)
            returned = tensor(1, split.config.hidden_size)
            await cloud.say(StepEnd(begun.session_id, begun.step_id, returned))
        await asyncio.Event().wait()

    async with serving(raw_cloud(deaf_for_a_while), Limits(max_queued_nbytes=1)) as address:
        model = split.split(address)
        link = await model.link()
        sequences = [await model.open_sequence(64) for _ in range(2)]
        tasks = [asyncio.create_task(s.forward(PROMPT, 0, "last")) for s in sequences]
        await let_run(5)  # the first step fills the cloud's queue, the second cannot be sent
        assert not any(task.done() for task in tasks)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        listening.set()
        await tasks[0]
        assert link.is_open, "both ends know the same"
        await model.aclose()


# Ending


async def test_closing_a_sequence_ends_its_step() -> None:
    split = world()
    async with serving(split.service().handle) as address:
        model = split.split(address)
        sequence, other = await model.open_sequence(64), await model.open_sequence(64)
        task = asyncio.create_task(sequence.forward(PROMPT, 0, "last"))
        await let_run(3)
        await sequence.aclose()
        await sequence.aclose()
        with pytest.raises(ConnectionClosed, match="sequence was closed"):
            await task
        with pytest.raises(ConnectionClosed, match="sequence is closed"):
            await sequence.forward(PROMPT, 0, "last")
        assert_same(await other.forward(PROMPT, 0, "all"), await solo(split.unsplit(), PROMPT))
        await model.aclose()


async def test_closing_the_model_ends_its_steps() -> None:
    split = world()
    async with serving(split.service().handle) as address:
        model = split.split(address)
        sequence = await model.open_sequence(64)
        task = asyncio.create_task(sequence.forward(PROMPT, 0, "last"))
        await let_run(3)
        await model.aclose()
        await model.aclose()
        with pytest.raises(ConnectionClosed, match="link to the cloud was closed"):
            await task
        with pytest.raises(ConnectionClosed):
            await sequence.forward(PROMPT, 0, "last")
        await sequence.aclose()
        again = await model.open_sequence(64)
        assert_same(await again.forward(PROMPT, 0, "all"), await solo(split.unsplit(), PROMPT))
        await model.aclose()


@pytest.mark.parametrize("options", ARRANGEMENTS)
async def test_a_link_may_be_lost_anywhere(options: dict[str, Any]) -> None:
    split = world(**options)
    expected = await solo(split.unsplit(), PROMPT)
    # Room for one: a session that a lost link left behind would be in the way.
    recorder = Recorder(split.service(replace(ROOMY, max_sessions=1)).handle)
    num_lost = 0
    async with serving(recorder) as address:
        model = split.split(address)
        ended = False
        while not ended:
            sequence = await model.open_sequence(64)
            link = await model.link()
            task = asyncio.create_task(sequence.forward(PROMPT, 0, "all"))
            await let_run(num_lost)
            ended = task.done()
            recorder.connections[-1].abort()
            await asyncio.wait({task})
            if task.exception() is None:  # the last message was there already
                assert_same(task.result(), expected)
            else:
                assert isinstance(task.exception(), ConnectionClosed)
                assert not ended
            await settled(lambda link=link: not link.is_open)  # type: ignore[misc]
            with pytest.raises(ConnectionClosed):
                await sequence.forward(PROMPT, 0, "all")
            await sequence.aclose()
            num_lost += 1
        assert len(recorder.connections) == num_lost
        last = await model.open_sequence(64)
        assert_same(await last.forward(PROMPT, 0, "all"), expected)
        await model.aclose()
    assert num_lost > 3 + len(split.plan.wire_points)
