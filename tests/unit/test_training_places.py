"""Places for trainers: who gets one, who loses it, and that all end with the cloud."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from privatelora.runtime.training_session import TrainingLimits
from privatelora.runtime.wire.codec import encode
from privatelora.runtime.wire.messages import (
    BatchSequence,
    CloseSession,
    ErrorCode,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    OpenSession,
    SessionClosed,
    SessionOpened,
    StepEnd,
)
from tests.unit.peers import raw_edge, tensor
from tests.unit.training_peers import (
    HIDDEN,
    LIMITS,
    N,
    Y,
    begin,
    forward,
    open_training,
    small,
    train,
    trainer,
)
from tests.unit.waiting import let_run
from tests.unit.world import serving, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")


async def test_an_idle_trainer_gives_way_and_is_told() -> None:
    split = small()
    service = split.service(replace(LIMITS, min_idle_s=1e-6))
    async with serving(service.handle) as address, trainer(split, address) as edge:
        await open_training(edge, 1)
        await forward(edge, begin())
        async with trainer(split, address) as newcomer:
            error = await edge.hear(ErrorReply)
            assert (error.code, error.session_id) == (ErrorCode.EVICTED, 0)
            assert "idle" in error.message
            await train(newcomer)
            await train(edge, session_id=1)


async def test_a_trainer_that_is_computed_for_does_not_give_way() -> None:
    """Nor one whose edge was heard of just now, however long the step takes."""
    split = world(every="all")  # so nothing is asked on the way
    limits = replace(
        LIMITS,
        min_idle_s=1e-6,
        max_batch_rows=1,
        training=TrainingLimits(max_rows=512, max_sessions=1),
    )
    async with (
        serving(split.service(limits).handle) as address,
        trainer(split, address) as edge,
        raw_edge(split, address) as newcomer,
    ):
        sequences = tuple(BatchSequence(1, 1) for _ in range(40))
        y = 4 * Y
        step = begin(sequences=sequences, hidden_states=tensor(40, HIDDEN), opening=tensor(40, y))
        await edge.say(step)
        await let_run(5)
        refused = await open_training(newcomer)
        assert isinstance(refused, ErrorReply)
        assert refused.code is ErrorCode.CAPACITY
        assert edge.connection.recv_nowait() is None, "it was to be at work meanwhile"
        await edge.hear(StepEnd)


async def test_a_place_is_given_away_once() -> None:
    """Two trainers wait for room among all sessions; there is a place for one of them to train."""
    split = small()
    limits = replace(
        LIMITS,
        max_sessions=2,
        max_waiting=2,
        min_idle_s=1e-6,
        training=TrainingLimits(max_rows=512, max_sessions=1),
    )
    service = split.service(limits)
    async with (
        serving(service.handle) as address,
        trainer(split, address) as idle,
        raw_edge(split, address) as conversation,
        raw_edge(split, address) as one,
        raw_edge(split, address) as other,
    ):
        await conversation.say(OpenSession(0, 64, "fp32", "fp32"))
        await conversation.hear(SessionOpened)
        await conversation.say(conversation.begin(0, 0, 0, [1, 20, 21]))
        await conversation.hear(ExchangeRequest)  # which leaves it in the middle of a step
        for edge in (one, other):
            await edge.say(OpenSession(0, 512, "fp32", "fp32", training=True))
        await let_run(20)
        await conversation.say(CloseSession(0))
        await conversation.hear(SessionClosed)
        assert (await idle.hear(ErrorReply)).code is ErrorCode.EVICTED
        get = service.metrics.registry.get_sample_value
        assert get("privatelora_cloud_sessions") == 1


async def test_who_leaves_frees_the_place_and_what_was_kept() -> None:
    split = small()
    limits = replace(LIMITS, min_idle_s=60.0, training=TrainingLimits(max_rows=512, max_sessions=1))
    async with serving(split.service(limits).handle) as address:
        async with trainer(split, address) as edge:
            await forward(edge, begin())
            await edge.say(CloseSession(0))
            await edge.hear(SessionClosed)
            assert isinstance(await open_training(edge, 1), SessionOpened)
            await edge.say(begin(session_id=1))
            await edge.hear(ExchangeRequest)
            edge.connection.abort()
        async with trainer(split, address) as edge:
            await train(edge)


async def test_a_cloud_that_drains_ends_training_and_lets_nobody_in() -> None:
    split = small()
    service = split.service(replace(LIMITS, min_idle_s=60.0))
    async with (
        serving(service.handle) as address,
        trainer(split, address) as edge,
        raw_edge(split, address) as waiting,
    ):
        await edge.say(begin())
        await edge.hear(ExchangeRequest)
        await asyncio.wait_for(service.drain(30.0), 10.0)  # training holds it up no longer
        error = await edge.hear(ErrorReply)
        assert (error.code, error.session_id) == (ErrorCode.DRAINING, 0)
        refused = await open_training(waiting)
        assert isinstance(refused, ErrorReply)
        assert refused.code is ErrorCode.DRAINING
        # As if it had been on its way: that is no breach, and the connection goes on.
        await edge.connection.send(*encode(ExchangeReply(0, 0, 1, tensor(N, Y))))
        assert isinstance(await open_training(edge, 1), ErrorReply)
