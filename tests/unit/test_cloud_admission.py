"""Room on a cloud: who gets in, who waits, who loses memory, and that everybody is served."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from privatelora.errors import CapacityError
from privatelora.partition.plan import ExchangePoint
from privatelora.runtime.engine import Step
from privatelora.runtime.generation import Context
from tests.unit.world import ROOMY, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [1, *range(20, 40)]


async def test_who_waits_gets_in_when_there_is_room() -> None:
    split = world()
    expected = await solo(split.unsplit(), PROMPT)
    limits = replace(ROOMY, max_sessions=2, max_waiting=2)
    async with serving(split.service(limits).handle) as address:
        model = split.split(address)
        held = [await model.open_sequence(64) for _ in range(2)]
        waiting = [asyncio.create_task(model.open_sequence(64)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        with pytest.raises(CapacityError, match=r"2 sessions already and 2 wait; try again in"):
            await model.open_sequence(64)
        for sequence, task in zip(held, waiting, strict=True):
            await sequence.aclose()
            assert_same(await (await task).forward(PROMPT, 0, "all"), expected)
        await model.aclose()


async def test_nobody_waits_for_ever() -> None:
    split = world()
    limits = replace(ROOMY, max_sessions=1, max_waiting=1, max_wait_s=0.05)
    async with serving(split.service(limits).handle) as address:
        model = split.split(address)
        held = await model.open_sequence(64)
        with pytest.raises(CapacityError, match="serves 1 sessions already"):
            await model.open_sequence(64)
        await held.aclose()
        await model.open_sequence(64)
        await model.aclose()


async def test_who_leaves_while_waiting_is_not_let_in() -> None:
    split = world()
    limits = replace(ROOMY, max_sessions=1, max_waiting=2)
    service = split.service(limits)
    async with serving(service.handle) as address:
        one, other = split.split(address), split.split(address)
        held = await one.open_sequence(64)
        gone = asyncio.create_task(other.open_sequence(64))
        await asyncio.sleep(0.01)
        await other.aclose()
        await asyncio.gather(gone, return_exceptions=True)
        await held.aclose()
        sequence = await one.open_sequence(64)
        await sequence.forward(PROMPT, 0, "last")
        await one.aclose()


async def test_a_client_has_only_its_share_of_sessions() -> None:
    split = world()
    limits = replace(ROOMY, max_sessions_per_client=2)
    async with serving(split.service(limits).handle) as address:
        one, other = split.split(address), split.split(address)
        await one.open_sequence(64)
        second = await other.open_sequence(64)  # of the same machine, so of the same client
        with pytest.raises(CapacityError, match="has 2 sessions already; close one"):
            await one.open_sequence(64)
        await second.aclose()
        await one.open_sequence(64)
        for model in (one, other):
            await model.aclose()


@pytest.mark.parametrize("every", [1, 2])
async def test_sessions_together_say_what_each_says_alone(every: int) -> None:
    split = world(every=every)
    prompts = [[1, *range(3 + i, 10 + 2 * i)] for i in range(16)]
    expected = [await solo(split.unsplit(), prompt) for prompt in prompts]
    limits = replace(ROOMY, max_sessions=16, max_sessions_per_client=16, max_batch_rows=32)
    async with serving(split.service(limits).handle) as address:
        models = [split.split(address) for _ in range(4)]

        async def run(number: int) -> None:
            sequence = await models[number % 4].open_sequence(64)
            prompt, cut = prompts[number], 2 + number % 5
            assert_same(await sequence.forward(prompt[:cut], 0, "all"), expected[number][:cut])
            for position in range(cut, len(prompt)):
                logits = await sequence.forward([prompt[position]], position, "last")
                assert_same(logits, expected[number][position : position + 1])
            await sequence.aclose()

        await asyncio.gather(*(run(number) for number in range(16)))
        for model in models:
            await model.aclose()


async def test_an_idle_session_makes_room_and_is_rebuilt_unseen() -> None:
    split = world()
    limits = replace(ROOMY, max_sessions=1, max_waiting=1, min_idle_s=1e-6)
    async with serving(split.service(limits).handle) as address:
        model = split.split(address)
        contexts = [await Context.open(model, 64)]
        await contexts[0].advance(PROMPT[:9])
        contexts.append(await Context.open(model, 64))  # which evicts the first
        for end in range(10, 18):
            expected = await solo(split.unsplit(), PROMPT[:end])
            for context in contexts:  # each takes the only place from the other
                assert_same(await context.advance(PROMPT[:end]), expected[-1])
                assert context.token_ids == PROMPT[:end]
        assert contexts[0].traffic.round_trips > 8 * len(split.plan.wire_points)
        await model.aclose()


async def test_memory_of_idle_sessions_goes_to_those_that_need_it() -> None:
    split = world()
    tokens = [*range(3, 63)]
    expected = await solo(split.unsplit(), tokens)
    limits = replace(ROOMY, max_cached_positions=128, min_idle_s=1e-6)
    service = split.service(limits)
    async with serving(service.handle) as address:
        model = split.split(address)
        contexts = [await Context.open(model, 64) for _ in range(6)]
        for end in (40, 50, 60):
            for context in contexts:
                assert_same(await context.advance(tokens[:end]), expected[end - 1])
        await model.aclose()


async def test_who_waits_gets_the_place_of_a_session_that_falls_idle() -> None:
    split = world()
    limits = replace(ROOMY, max_sessions=1, max_waiting=1, min_idle_s=0.2, max_wait_s=30)
    async with serving(split.service(limits).handle) as address:
        model = split.split(address)
        first = await Context.open(model, 64)
        await first.advance(PROMPT[:5])
        async with asyncio.timeout(10):
            second = await Context.open(model, 64)  # the first was used a moment ago
        expected = await solo(split.unsplit(), PROMPT)
        assert_same(await second.advance(PROMPT), expected[-1])
        await model.aclose()


async def test_a_session_at_work_is_not_evicted() -> None:
    split = world()
    limits = replace(ROOMY, max_sessions=1, max_waiting=1, max_wait_s=0.05)
    async with serving(split.service(limits).handle) as address:
        model = split.split(address)
        context = await Context.open(model, 64)
        await context.advance(PROMPT)
        with pytest.raises(CapacityError, match="serves 1 sessions already"):
            await Context.open(model, 64)
        await context.advance([*PROMPT, 5])
        await model.aclose()


async def test_a_batch_that_fails_ends_its_sessions_and_no_others() -> None:
    split = world()
    service = split.service()
    advance_batch = service.engine.advance_batch

    def fail_prefill(steps: Sequence[Step]) -> ExchangePoint | None:
        if len(steps) > 1:
            raise RuntimeError("no memory left")
        return advance_batch(steps)

    service.engine.advance_batch = fail_prefill  # type: ignore[method-assign]
    async with serving(service.handle) as address:
        model = split.split(address, max_step_positions=4)
        failing, spared = await Context.open(model, 64), await Context.open(model, 64)
        with pytest.raises(CapacityError, match="could not compute: no memory left"):
            await failing.advance(PROMPT)
        for end in range(1, 6):
            expected = await solo(split.unsplit(), PROMPT[:end])
            assert_same(await spared.advance(PROMPT[:end]), expected[-1])
        await model.aclose()
