"""Sessions that go on after their connection was lost, with what the cloud kept of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from privatelora.errors import CapacityError
from privatelora.runtime.client_tokens import Tokens, digest
from privatelora.runtime.cloud_service import CloudService
from privatelora.runtime.generation import Context
from privatelora.runtime.kv_cache import BLOCK_SIZE
from privatelora.runtime.wire.messages import ErrorCode, OpenSession, SessionOpened
from privatelora.transports.base import Connection
from tests.unit.peers import raw_edge
from tests.unit.waiting import Recorder, let_run, settled
from tests.unit.world import BOTH_BORDERS, ROOMY, World, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [1, *range(20, 60)]
NEXT = [61, 62, 63]


def kept(service: CloudService) -> int:
    """Blocks of the cache in use."""
    value = service.metrics.registry.get_sample_value("privatelora_cloud_kv_blocks_used")
    assert value is not None
    return int(value)


def num_detached(service: CloudService) -> int:
    value = service.metrics.registry.get_sample_value("privatelora_cloud_detached_sessions")
    assert value is not None
    return int(value)


@pytest.mark.parametrize("options", [{}, BOTH_BORDERS, {"every": 2}])
async def test_only_what_is_new_is_run_after_the_link_was_lost(options: dict[str, Any]) -> None:
    split = world(**options)
    expected = await solo(split.unsplit(), PROMPT + NEXT)
    service = split.service()
    recorder = Recorder(service.handle)
    async with serving(recorder) as address:
        model = split.split(address)
        context = await Context.open(model, patience_s=10)
        await context.advance(PROMPT)
        for number, end in enumerate(range(len(PROMPT) + 1, len(PROMPT) + len(NEXT) + 1)):
            recorder.connections[-1].abort()
            if number:  # the edge may know it already, or learn of it in the middle
                await settled(lambda: not context._sequence.is_open)
            logits = await context.advance((PROMPT + NEXT)[:end])
            assert_same(logits, expected[end - 1])
        assert service.metrics.sessions_resumed == len(NEXT)
        assert service.metrics.positions <= len(PROMPT) + 2 * len(NEXT)
        await context.aclose()
        await settled(lambda: kept(service) == 0)
        await model.aclose()


@pytest.mark.parametrize("options", [{}, BOTH_BORDERS])
async def test_it_may_be_lost_anywhere(options: dict[str, Any]) -> None:
    split = world(**options)
    expected = await solo(split.unsplit(), PROMPT + NEXT)
    service = split.service(replace(ROOMY, max_sessions=1))
    recorder = Recorder(service.handle)
    async with serving(recorder) as address:
        model = split.split(address, max_step_positions=6)
        for num_turns in range(0, 120, 7):
            context = await Context.open(model, patience_s=10)
            task = asyncio.create_task(context.advance(PROMPT))
            await let_run(num_turns)
            recorder.connections[-1].abort()
            assert_same(await task, expected[len(PROMPT) - 1])
            assert_same(await context.advance(PROMPT + NEXT), expected[-1])
            await context.aclose()
        await model.aclose()
    assert service.metrics.sessions_resumed > 0


async def test_steps_that_had_not_ended_count_as_not_run() -> None:
    split = world()
    expected = await solo(split.unsplit(), PROMPT)
    service = split.service()
    async with serving(service.handle) as address:
        async with raw_edge(split, address) as edge:
            opened = await edge.open(0)
            await edge.run(0, 0, 0, PROMPT[:9])
            await edge.say(edge.begin(0, 1, 9, PROMPT[9:20]), edge.begin(0, 2, 20, PROMPT[20:]))
            await edge.hear(object)  # so they have begun
            edge.connection.abort()
        await settled(lambda: num_detached(service) == 1)
        async with raw_edge(split, address) as edge:
            again = await edge.open(5, resume=opened.resume)
            assert again.num_positions == 9
            ended = await edge.run(5, 0, 9, PROMPT[9:])
            assert_same(edge.logits(ended.hidden_states), expected[9:])


async def test_a_token_works_once() -> None:
    split = world()
    service = split.service()
    async with serving(service.handle) as address:
        tokens: list[str | None] = []
        for num_positions in (0, 3, 3):
            async with raw_edge(split, address) as edge:
                opened = await edge.open(0, resume=tokens[-1] if tokens else None)
                assert opened.num_positions == num_positions
                tokens.append(opened.resume)
                if not num_positions:
                    await edge.run(0, 0, 0, PROMPT[:3])
                edge.connection.abort()
            await settled(lambda: num_detached(service) == 1)
        assert len({*tokens}) == 3
        async with raw_edge(split, address) as edge:
            for session_id, used in enumerate(tokens[:2]):
                assert (await edge.open(session_id, resume=used)).num_positions == 0
            assert (await edge.open(7, resume=tokens[2])).num_positions == 3


ALICE, BOB = "a" * 43, "b" * 43
KNOWN = Tokens({digest(ALICE): "alice", digest(BOB): "bob"})


async def left_behind(split: World, address: str, service: CloudService, token: str) -> str:
    """The token of a session of three positions whose connection was lost."""
    async with raw_edge(split, address, token) as edge:
        opened = await edge.open(0)
        await edge.run(0, 0, 0, PROMPT[:3])
        edge.connection.abort()
    await settled(lambda: num_detached(service) == 1)
    assert opened.resume is not None
    return opened.resume


async def test_a_stolen_token_is_worth_nothing_to_another_client() -> None:
    split = world()
    service = split.service(tokens=KNOWN)
    async with serving(service.handle) as address:
        stolen = await left_behind(split, address, service, ALICE)
        async with raw_edge(split, address, BOB) as bob:
            answers = [
                await bob.open(i, resume=each) for i, each in enumerate([stolen, "invented"])
            ]
            assert [answer.num_positions for answer in answers] == [0, 0]
            await bob.run(0, 0, 0, PROMPT[:3])
            async with raw_edge(split, address, ALICE) as alice:
                assert (await alice.open(0, resume=stolen)).num_positions == 3
                # Nor can a session that is in use be taken away with its token.
                in_use = (await alice.open(1, resume=None)).resume
                await alice.run(1, 0, 0, PROMPT[:3])
                assert (await bob.open(9, resume=in_use)).num_positions == 0
                await alice.run(1, 1, 3, PROMPT[3:5])


async def test_a_connection_that_lingers_loses_its_session() -> None:
    split = world()
    expected = await solo(split.unsplit(), PROMPT)
    service = split.service(replace(ROOMY, max_sessions=2, max_sessions_per_client=2))
    async with serving(service.handle) as address, raw_edge(split, address) as old:
        opened = await old.open(0)
        await old.run(0, 0, 0, PROMPT[:5])
        other = await old.open(1)
        async with raw_edge(split, address) as new:
            assert (await new.open(0, resume=opened.resume)).num_positions == 5
            reply = await old.hear_error()
            assert (reply.session_id, reply.code) == (0, ErrorCode.EVICTED)
            await old.run(1, 0, 0, PROMPT[:5])  # its other session goes on
            ended = await new.run(0, 0, 5, PROMPT[5:])
            assert_same(new.logits(ended.hidden_states), expected[5:])
            assert other.resume != opened.resume


async def test_another_length_is_another_session() -> None:
    split = world()
    service = split.service()
    async with serving(service.handle) as address:
        async with raw_edge(split, address) as edge:
            opened = await edge.open(0, max_positions=64)
            await edge.run(0, 0, 0, PROMPT[:3])
            edge.connection.abort()
        await settled(lambda: num_detached(service) == 1)
        async with raw_edge(split, address) as edge:
            again = await edge.open(0, max_positions=32, resume=opened.resume)
            assert (again.max_positions, again.num_positions) == (32, 0)
            assert kept(service) == 0


async def test_what_is_kept_is_forgotten_in_time() -> None:
    split = world()
    service = split.service(replace(ROOMY, resume_timeout_s=0.05))
    async with serving(service.handle) as address:
        async with raw_edge(split, address) as edge:
            opened = await edge.open(0)
            await edge.run(0, 0, 0, PROMPT[:3])
            assert kept(service) > 0
            edge.connection.abort()
        await settled(lambda: kept(service) == 0)
        async with raw_edge(split, address) as edge:
            assert (await edge.open(0, resume=opened.resume)).num_positions == 0


async def test_a_cloud_that_keeps_nothing_gives_no_token() -> None:
    split = world()
    service = split.service(replace(ROOMY, resume_timeout_s=0))
    async with serving(service.handle) as address:
        async with raw_edge(split, address) as edge:
            assert (await edge.open(0)).resume is None
            await edge.run(0, 0, 0, PROMPT[:3])
            edge.connection.abort()
        await settled(lambda: kept(service) == 0)
        # An edge of the other kind rebuilds what it had.
        model = split.split(address)
        context = await Context.open(model, patience_s=10)
        await context.advance(PROMPT)
        (await model.link())._connection.abort()
        expected = await solo(split.unsplit(), [*PROMPT, 7])
        assert_same(await context.advance([*PROMPT, 7]), expected[-1])
        await model.aclose()


async def test_memory_that_others_need_is_taken_from_what_is_kept() -> None:
    split = world()
    limits = replace(ROOMY, max_cached_positions=4 * BLOCK_SIZE, min_idle_s=1000)
    service = split.service(limits)
    async with serving(service.handle) as address:
        tokens = []
        for _ in range(2):
            async with raw_edge(split, address) as edge:
                opened = await edge.open(0)
                tokens.append(opened.resume)
                await edge.run(0, 0, 0, PROMPT[:BLOCK_SIZE])
                edge.connection.abort()
            await settled(lambda: num_detached(service) == len(tokens))
        async with raw_edge(split, address) as edge:
            await edge.open(0)
            await edge.run(0, 0, 0, PROMPT[: 2 * BLOCK_SIZE + 1])  # takes the older one's
            await edge.open(1, resume=tokens[0])
            again = await edge.open(2, resume=tokens[1])
            assert again.num_positions == BLOCK_SIZE
            await edge.say(edge.begin(1, 0, 0, PROMPT[:BLOCK_SIZE]))
            reply = await edge.hear_error()  # nothing is kept any more, and nobody idle
            assert (reply.session_id, reply.code) == (1, ErrorCode.CAPACITY)


@pytest.mark.parametrize("most", [1, 2, 4, 7, 16])
async def test_a_client_leaves_no_more_behind_than_it_may_have(most: int) -> None:
    split = world()
    service = split.service(replace(ROOMY, max_sessions_per_client=most))
    async with serving(service.handle) as address:
        tokens = []
        for _ in range(5):
            async with raw_edge(split, address) as edge:
                tokens.append((await edge.open(0)).resume)
                await edge.run(0, 0, 0, PROMPT[:3])
                edge.connection.abort()
            await settled(lambda: service.connections.num_clients == 0)
        assert num_detached(service) == min(5, most)
        async with raw_edge(split, address) as edge:
            for session_id, token in enumerate(tokens[-most:]):
                assert (await edge.open(session_id, resume=token)).num_positions == 3


async def test_a_cloud_that_shuts_down_keeps_nothing() -> None:
    split = world()
    service = split.service(tokens=KNOWN)
    async with serving(service.handle) as address:
        await left_behind(split, address, service, ALICE)
        async with raw_edge(split, address, BOB) as edge:
            opened = await edge.open(0)
            await edge.run(0, 0, 0, PROMPT[:3])
            draining = asyncio.create_task(service.drain(10))
            await settled(lambda: service.is_draining)
            assert num_detached(service) == 0
            await edge.say(OpenSession(1, 64, "fp32", "fp32", opened.resume))
            assert "shutting down" in (await edge.hear_error()).message
            edge.connection.abort()
        await draining
    assert kept(service) == 0


async def test_an_edge_is_resumed_by_a_cloud_that_refused_it_before() -> None:
    """A session that waits for room is resumed when there is some."""
    split = world()
    service = split.service(replace(ROOMY, max_sessions=1, max_waiting=1, min_idle_s=1000))
    async with serving(service.handle) as address:
        async with raw_edge(split, address) as edge:
            opened = await edge.open(0)
            await edge.run(0, 0, 0, PROMPT[:3])
            edge.connection.abort()
        await settled(lambda: num_detached(service) == 1)
        model = split.split(address)
        held = await model.open_sequence(64)
        async with raw_edge(split, address) as edge:
            await edge.say(OpenSession(0, 64, "fp32", "fp32", opened.resume))
            await settled(lambda: len(service._waiting) == 1)
            await held.aclose()
            assert (await edge.hear(SessionOpened)).num_positions == 3
        await model.aclose()


async def test_who_is_refused_after_the_link_was_lost_is_told() -> None:
    split = world()
    service = split.service(replace(ROOMY, max_sessions=1, min_idle_s=1000))
    recorder = Recorder(service.handle)
    async with serving(recorder) as address:
        model, other = split.split(address), split.split(address)
        context = await Context.open(model)
        await context.advance(PROMPT)
        recorder.connections[-1].abort()
        await settled(lambda: num_detached(service) == 1)
        held = await other.open_sequence(64)
        with pytest.raises(CapacityError, match="serves 1 sessions already"):
            await context.advance([*PROMPT, 7])
        await held.aclose()
        expected = await solo(split.unsplit(), [*PROMPT, 7])
        assert_same(await context.advance([*PROMPT, 7]), expected[-1])
        assert service.metrics.sessions_resumed == 1
        for each in (model, other):
            await each.aclose()


async def test_what_a_cloud_offers_is_forgotten_with_it() -> None:
    split = world()
    small, roomy = split.service(replace(ROOMY, max_positions=7)), split.service()
    services = [small, roomy]

    async def handle(connection: Connection) -> None:
        await services[0].handle(connection)

    recorder = Recorder(handle)
    async with serving(recorder) as address:
        model = split.split(address)
        await model.link()
        assert model.max_positions == 7
        del services[0]
        recorder.connections[-1].abort()
        link = await model.link()
        await settled(lambda: not link.is_open)
        assert model.max_positions == 128  # so that longer ones are tried again
        context = await Context.open(model)
        expected = await solo(split.unsplit(), PROMPT)
        assert_same(await context.advance(PROMPT), expected[-1])
        await model.aclose()
