"""Connections: how many there may be, how long they may be silent, and whose are ended."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from privatelora.errors import AuthError, CapacityError, ConnectionClosed, TransportTimeout
from privatelora.runtime.client_tokens import TokensFile, digest
from privatelora.runtime.cloud_peer import MAX_CONTROL_PER_S
from privatelora.runtime.generation import Context
from privatelora.runtime.wire.messages import ErrorCode, Ping, Pong
from privatelora.transports.base import Connection, Limits
from privatelora.transports.connection import QueuedConnection
from privatelora.transports.registry import connect
from tests.unit.peers import RawCloud, RawEdge, raw_cloud, raw_edge
from tests.unit.waiting import Recorder, settled
from tests.unit.world import ROOMY, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [1, *range(20, 40)]
ALICE, BOB = "a" * 43, "b" * 43


async def test_who_says_nothing_makes_way_for_others() -> None:
    split = world()
    service = split.service(replace(ROOMY, max_connections=8))
    async with serving(service.handle) as address, AsyncExitStack() as stack:
        silent = [await connect(address, Limits()) for _ in range(5)]
        for connection in silent:
            await stack.enter_async_context(connection)
        ended = [asyncio.create_task(connection.recv()) for connection in silent]
        await settled(lambda: sum(task.done() for task in ended) == 3)
        assert [task.done() for task in ended] == [True, True, True, False, False]
        async with raw_edge(split, address) as edge:  # which needs the place of the fourth
            await edge.open(0)
        for connection in silent:
            connection.abort()
        for task in ended:
            with pytest.raises(ConnectionClosed):
                await task


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_connections": 2}, "this cloud has 2 connections already; try again later"),
        ({"max_connections_per_client": 2}, "has 2 connections already; close one first"),
    ],
)
async def test_clients_are_limited(limits: dict[str, int], reason: str) -> None:
    split = world()
    service = split.service(replace(ROOMY, **limits))
    async with serving(service.handle) as address:
        models = [split.split(address) for _ in range(3)]
        for model in models[:2]:
            await model.open_sequence(8)
        with pytest.raises(CapacityError, match=reason):
            await models[2].open_sequence(8)
        await models[0].aclose()
        await settled(lambda: service.connections.num_clients == 1)
        await models[2].open_sequence(8)
        for model in models[1:]:
            await model.aclose()
        await settled(lambda: service.connections.num_clients == 0)


async def test_an_edge_that_falls_silent_is_dropped_and_its_cache_kept() -> None:
    split = world()
    service = split.service(replace(ROOMY, max_silence_s=0.1))
    async with serving(service.handle) as address:
        async with raw_edge(split, address) as edge:
            opened = await edge.open(0)
            await edge.run(0, 0, 0, PROMPT[:3])
            with pytest.raises(ConnectionClosed):
                await edge.hear(object)
        async with raw_edge(split, address) as edge:
            assert (await edge.open(0, resume=opened.resume)).num_positions == 3


async def test_an_edge_with_nothing_to_say_asks_whether_the_cloud_is_there() -> None:
    split = world()
    service = split.service(replace(ROOMY, max_silence_s=0.1))
    recorder = Recorder(service.handle)
    async with serving(recorder) as address:
        model = split.split(address, keepalive_s=0.02)
        await model.open_sequence(8)
        [connection] = recorder.connections
        await settled(lambda: connection.counters.received_frames > 20)  # some 0.4 s
        assert len(recorder.connections) == 1
        await model.aclose()


async def silent_after_a_ping(cloud: RawCloud) -> None:
    ping = await cloud.hear(Ping)
    await cloud.say(Pong(ping.nonce))
    await cloud.hear(Ping)
    await cloud.listen_on()


async def test_a_cloud_that_falls_silent_is_noticed() -> None:
    async with serving(raw_cloud(silent_after_a_ping)) as address:
        model = world().split(address, keepalive_s=0.05)
        link = await model.link()
        await settled(lambda: not link.is_open)
        with pytest.raises(TransportTimeout, match=r"did not answer within 0\.05 s"):
            link.require_open()
        await model.aclose()


def tokens_file(path: Path, **tokens: str) -> Path:
    path.write_text("".join(f"{name}: {digest(token)}\n" for name, token in tokens.items()))
    return path


async def test_clients_come_and_go_with_the_tokens_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split = world()
    path = tokens_file(tmp_path / "tokens.yaml", alice=ALICE)
    service = split.service(replace(ROOMY, max_silence_s=0.05), tokens=TokensFile(path))
    async with serving(service.handle) as address:
        alice = split.split(address, keepalive_s=0.01, token=lambda: SecretStr(ALICE))
        bob = split.split(address, keepalive_s=0.01, token=lambda: SecretStr(BOB))
        sequence = await alice.open_sequence(64)
        with pytest.raises(AuthError, match="does not know the token"):
            await bob.open_sequence(64)
        tokens_file(path, alice=ALICE, bob=BOB)
        await bob.open_sequence(64)
        path.write_text("alice: nonsense\n")  # what it said before holds
        await sequence.forward(PROMPT, 0, "last")
        await settled(lambda: "what it said before holds" in caplog.text)
        assert ALICE not in caplog.text
        tokens_file(path, bob=BOB)
        link = await alice.link()
        await settled(lambda: not link.is_open)
        with pytest.raises(AuthError, match="does not know the token"):
            await sequence.forward([7], len(PROMPT), "last")
        with pytest.raises(AuthError, match="does not know the token"):
            await alice.open_sequence(64)
        assert (await bob.link()).is_open
        for model in (alice, bob):
            await model.aclose()


async def test_who_is_shut_out_and_stays_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privatelora.runtime.cloud_peer.GOODBYE_TIMEOUT_S", 0.05)
    split = world()
    path = tokens_file(tmp_path / "tokens.yaml", alice=ALICE)
    service = split.service(replace(ROOMY, max_silence_s=0.02), tokens=TokensFile(path))
    async with serving(service.handle) as address, raw_edge(split, address, ALICE) as edge:
        await edge.open(0)
        tokens_file(path, bob=BOB)
        await edge.connection.send(*edge.wire.send(Ping(1)))  # else it would be silent
        reply = None
        while reply is None:
            message = edge.wire.receive(await edge.connection.recv())
            reply = None if isinstance(message, Pong) else message
        assert getattr(reply, "code", None) is ErrorCode.AUTH
        assert service.connections.num_clients == 1
        await settled(lambda: service.connections.num_clients == 0)


async def test_who_is_trusted_no_more_has_to_come_again() -> None:
    """And does so unseen, if the keys have only changed for others."""
    split = world()
    service = split.service(replace(ROOMY, max_silence_s=0.05))
    connections: list[QueuedConnection] = []
    changed = asyncio.Event()

    async def handle(connection: Connection) -> None:
        assert isinstance(connection, QueuedConnection)
        if not connections:
            connection.ask_trust = lambda: not changed.is_set()
        connections.append(connection)
        await service.handle(connection)

    async with serving(handle) as address:
        model = split.split(address, keepalive_s=0.01)
        context = await Context.open(model, patience_s=10)
        await context.advance(PROMPT)
        changed.set()
        link = await model.link()
        await settled(lambda: not link.is_open)
        expected = await solo(split.unsplit(), [*PROMPT, 7])
        assert_same(await context.advance([*PROMPT, 7]), expected[-1])
        assert (len(connections), service.metrics.sessions_resumed) == (2, 1)
        await model.aclose()


async def test_a_flood_of_small_talk_is_read_slowly() -> None:
    """Pings, each legal, as fast as they are answered; somebody else is served meanwhile."""
    split = world()
    expected = await solo(split.unsplit(), PROMPT)
    service = split.service()
    num_pongs = 0

    async def chatter(edge: RawEdge) -> None:
        nonlocal num_pongs
        while True:
            await edge.say(Ping(num_pongs + 1))
            await edge.hear(Pong)
            num_pongs += 1

    async with serving(service.handle) as address, raw_edge(split, address) as edge:
        started = time.monotonic()
        task = asyncio.create_task(chatter(edge))
        await settled(lambda: num_pongs >= 120)
        elapsed_s = time.monotonic() - started
        assert num_pongs <= MAX_CONTROL_PER_S * (elapsed_s + 1) + 2
        assert elapsed_s > 0.1
        model = split.split(address)
        sequence = await model.open_sequence(64)
        assert_same(await sequence.forward(PROMPT, 0, "all"), expected)
        await model.aclose()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
