"""What one client may have on a cloud, and that others lose nothing for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr

from privatelora.errors import CapacityError
from privatelora.runtime import cloud_peer
from privatelora.runtime.client_tokens import Tokens, digest
from privatelora.runtime.cloud_service import CloudLimits, CloudService
from privatelora.runtime.generation import Context
from privatelora.runtime.kv_cache import BLOCK_SIZE
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.split_model import SplitModel
from privatelora.runtime.wire.codec import encode
from privatelora.runtime.wire.messages import (
    CloseSession,
    ExchangeRequest,
    Hello,
    Ping,
    Pong,
    Role,
    SessionClosed,
    StepEnd,
)
from privatelora.transports.base import Limits
from privatelora.transports.registry import connect
from tests.unit.peers import RawEdge, raw_edge
from tests.unit.world import PRINTS, ROOMY, World, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

TOKENS = [*range(3, 63)]
ALICE, BOB = SecretStr("a" * 43), SecretStr("b" * 43)
KNOWN = Tokens(
    {digest(token.get_secret_value()): token.get_secret_value()[0] for token in (ALICE, BOB)}
)


@asynccontextmanager
async def two_clients(
    split: World, limits: CloudLimits
) -> AsyncIterator[tuple[CloudService, SplitModel, SplitModel]]:
    """A cloud, and the models of alice and bob, who are known by their tokens."""
    service = split.service(limits, tokens=KNOWN)
    async with serving(service.handle) as address:
        alice, bob = (
            split.split(address, token=lambda token=token: token) for token in (ALICE, BOB)
        )
        yield service, alice, bob
        await alice.aclose()
        await bob.aclose()


def used_blocks(service: CloudService) -> float:
    """Of the KV cache, by all clients together."""
    value = service.metrics.registry.get_sample_value("privatelora_cloud_kv_blocks_used")
    assert value is not None
    return value


# Cached positions


async def test_a_client_out_of_its_share_loses_its_own_idle_sessions() -> None:
    split = world()
    expected = await solo(split.unsplit(), TOKENS)
    limits = replace(ROOMY, max_cached_positions_per_client=128, min_idle_s=1e-6)
    async with two_clients(split, limits) as (service, alice, bob):
        others = await Context.open(bob, 64)  # idle for longest
        await others.advance(TOKENS)
        others_blocks = used_blocks(service)
        contexts = [await Context.open(alice, 64) for _ in range(4)]
        for end in (40, 50, 60):
            for context in contexts:
                assert_same(await context.advance(TOKENS[:end]), expected[end - 1])
                assert used_blocks(service) - others_blocks <= 128 // BLOCK_SIZE
        assert service.metrics.sessions_evicted > 6
        before = others.traffic.round_trips
        await others.advance([*TOKENS, 7])
        assert others.traffic.round_trips - before <= 1 + len(split.plan.wire_points)


async def test_a_client_out_of_its_share_is_refused_and_others_lose_nothing() -> None:
    split = world()
    limits = replace(ROOMY, max_cached_positions_per_client=64, min_idle_s=30.0)
    async with two_clients(split, limits) as (service, alice, bob):
        others = await Context.open(bob, 64)
        await others.advance(TOKENS)
        first = await Context.open(alice, 64)
        await first.advance(TOKENS[:40])
        second = await Context.open(alice, 64)
        with pytest.raises(CapacityError) as caught:
            await second.advance(TOKENS[:40])
        assert str(caught.value) == (
            "token:a may have 64 cached positions, holds 48 and needs 32 more; close a session, "
            "or let one be idle"
        )
        assert caught.value.retry_after_s == 30.0
        assert service.metrics.sessions_evicted == 0
        await second.aclose()
        expected = await solo(split.unsplit(), TOKENS)
        assert_same(await first.advance(TOKENS), expected[-1])
        await first.aclose()
        third = await Context.open(alice, 64)
        assert_same(await third.advance(TOKENS), expected[-1])


async def test_positions_of_closed_sessions_count_no_more() -> None:
    split = world()
    limits = replace(ROOMY, max_cached_positions_per_client=64, min_idle_s=30.0)
    async with two_clients(split, limits) as (_, alice, _):
        for _ in range(5):
            context = await Context.open(alice, 64)
            await context.advance(TOKENS)
            await context.aclose()


# Steps per second


async def test_steps_beyond_the_rate_begin_later_and_in_order() -> None:
    split = world()
    rate = 20
    limits = replace(ROOMY, max_steps_per_s_per_client=rate)
    expected = await solo(split.unsplit(), TOKENS[:40])
    async with two_clients(split, limits) as (_, alice, bob):
        contexts = [await Context.open(alice, 64) for _ in range(2)]
        started = time.monotonic()

        async def decode(context: Context) -> None:
            for end in range(1, 13):
                assert_same(await context.advance(TOKENS[:end]), expected[end - 1])

        await asyncio.gather(*map(decode, contexts))
        # Of 24 steps 20 begin in the first second, if that is full.
        assert time.monotonic() - started >= (24 - rate) / rate
        await decode(await Context.open(bob, 64))


async def test_chunks_of_a_prompt_that_are_held_run_in_order() -> None:
    split = world()
    limits = replace(ROOMY, max_steps_per_s_per_client=8)
    expected = await solo(split.unsplit(), TOKENS)
    async with serving(split.service(limits).handle) as address:
        model = split.split(address, max_step_positions=5)  # 12 steps at once
        context = await Context.open(model, 64)
        started = time.monotonic()
        assert_same(await context.advance(TOKENS), expected[-1])
        assert time.monotonic() - started >= (12 - 8) / 8
        await model.aclose()


async def test_a_session_whose_steps_are_held_is_not_idle() -> None:
    split = world()
    limits = replace(
        ROOMY,
        max_sessions=1,
        max_waiting=1,
        max_wait_s=0.2,
        min_idle_s=1e-6,
        max_steps_per_s_per_client=1,
    )
    async with two_clients(split, limits) as (service, alice, bob):
        held = await Context.open(alice, 64)
        await held.advance(TOKENS[:5])
        going_on = asyncio.create_task(held.advance(TOKENS[:6]))  # begins in a second
        with pytest.raises(CapacityError, match="serves 1 sessions already"):
            await Context.open(bob, 64)
        assert not going_on.done()
        assert service.metrics.sessions_evicted == 0
        await going_on
        await Context.open(bob, 64)


async def test_a_session_that_is_closed_leaves_nothing_of_its_held_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = world()
    service = split.service(replace(ROOMY, max_steps_per_s_per_client=0.001))
    n = 3
    async with serving(service.handle) as address, raw_edge(split, address) as edge:
        await edge.open(0)
        await edge.open(1)
        timers = record_timers(monkeypatch)
        for session_id in (0, 1):
            for step_id in range(3):
                await edge.say(edge.begin(session_id, step_id, n * step_id, TOKENS[:n]))
        for _ in split.plan.wire_points:  # the first step has taken all there is for long
            await edge.say(edge.answer(await edge.hear(ExchangeRequest)))
        await edge.hear(StepEnd)
        await edge.say(Ping(0), CloseSession(0), Ping(1))
        await edge.hear(Pong)
        await edge.hear(SessionClosed)
        await edge.hear(Pong)
        assert [timer.cancelled() for timer in timers] == [False]  # session 1 has steps still
        await edge.say(CloseSession(1))
        await edge.hear(SessionClosed)
        assert [timer.cancelled() for timer in timers] == [True]


def record_timers(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.TimerHandle]:
    """All timers that are started from now on."""
    loop = asyncio.get_running_loop()
    timers, call_later = [], loop.call_later

    def record(*arguments: Any) -> asyncio.TimerHandle:
        timers.append(call_later(*arguments))
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", record)
    return timers


async def test_a_client_that_comes_again_has_no_new_burst() -> None:
    split = world()
    limits = replace(ROOMY, max_steps_per_s_per_client=5)
    async with two_clients(split, limits) as (_, alice, _):
        started = time.monotonic()
        for _ in range(8):
            context = await Context.open(alice, 64)
            await context.advance(TOKENS[:5])
            await context.aclose()
        assert time.monotonic() - started >= (8 - 5) / 5


# Round trips


async def test_a_ping_is_answered_while_sessions_compute() -> None:
    split = world()
    async with serving(split.service().handle) as address, raw_edge(split, address) as edge:
        await edge.open(0)
        await edge.say(edge.begin(0, 0, 0, TOKENS[:5]), Ping(3), Ping(9))
        heard = [edge.wire.receive(await edge.connection.recv()) for _ in range(3)]
        assert [type(message) for message in heard].count(ExchangeRequest) == 1
        assert [message for message in heard if isinstance(message, Pong)] == [Pong(3), Pong(9)]


async def test_an_edge_that_asks_and_does_not_read_is_sent_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cloud_peer, "MAX_UNREAD", 100)
    monkeypatch.setattr(cloud_peer, "MAX_CONTROL_PER_S", 1e9)
    split = world()
    async with (
        serving(split.service().handle) as address,
        await connect(address, Limits(max_queued_nbytes=1000)) as connection,
    ):
        edge = RawEdge(split, connection)
        await edge.say(Hello(Role.EDGE, "raw edge", PRINTS, CODEC_NAMES, 2**20))
        await edge.hear(Hello)
        for nonce in range(200):  # past what this end may say
            await connection.send(*encode(Ping(nonce)))
        await edge.listen_on()
    assert "refused: it does not read: 101 messages wait for it" in caplog.text
