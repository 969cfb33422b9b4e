"""A cloud that ends lets answers come to their end, and nobody in."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from privatelora.errors import CapacityError
from tests.unit.waiting import settled
from tests.unit.world import ROOMY, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [1, *range(20, 40)]
PATIENCE_S = 30.0
SHUTTING_DOWN = "this cloud is shutting down; try again later"


async def test_a_session_goes_on_and_no_other_begins() -> None:
    split = world()
    expected = await solo(split.unsplit(), PROMPT)
    service = split.service(replace(ROOMY, min_idle_s=PATIENCE_S))
    async with serving(service.handle) as address:
        inside, outside = split.split(address), split.split(address)
        sequence = await inside.open_sequence(64)
        await sequence.forward(PROMPT[:5], 0, "last")
        drained = asyncio.create_task(service.drain(PATIENCE_S))
        await asyncio.sleep(0)
        assert service.is_draining
        for model in (inside, outside):  # on a connection that it has, and on a new one
            with pytest.raises(CapacityError, match=SHUTTING_DOWN):
                await model.open_sequence(64)
        assert_same(await sequence.forward(PROMPT[5:], 5, "all"), expected[5:])
        assert not drained.done()
        await sequence.aclose()
        await drained
        for model in (inside, outside):
            await model.aclose()


async def test_who_waits_is_sent_away() -> None:
    split = world()
    service = split.service(replace(ROOMY, max_sessions=1, max_waiting=1, max_wait_s=PATIENCE_S))
    async with serving(service.handle) as address:
        model = split.split(address)
        held = await model.open_sequence(64)
        waiting = asyncio.create_task(model.open_sequence(64))
        get = service.metrics.registry.get_sample_value
        await settled(lambda: get("privatelora_cloud_waiting_sessions") == 1)
        drained = asyncio.create_task(service.drain(PATIENCE_S))
        with pytest.raises(CapacityError, match=SHUTTING_DOWN):
            await waiting
        await held.aclose()
        await drained
        await model.aclose()


async def test_an_idle_session_holds_nobody_up() -> None:
    split = world()
    service = split.service(replace(ROOMY, min_idle_s=1e-6))
    async with serving(service.handle) as address:
        model = split.split(address)
        sequence = await model.open_sequence(64)
        await sequence.forward(PROMPT, 0, "last")
        await asyncio.wait_for(service.drain(PATIENCE_S), PATIENCE_S / 2)
        await model.aclose()


@pytest.mark.parametrize("timeout_s", [0.0, 0.05])
async def test_it_does_not_wait_for_ever(timeout_s: float) -> None:
    split = world()
    service = split.service(replace(ROOMY, min_idle_s=PATIENCE_S))
    async with serving(service.handle) as address:
        model = split.split(address)
        await model.open_sequence(64)
        started = time.monotonic()
        await service.drain(timeout_s)
        assert timeout_s <= time.monotonic() - started < PATIENCE_S / 2
        await model.aclose()
