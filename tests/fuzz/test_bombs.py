"""Small blocks of large tensors, sent to the ends that the daemons have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lz4.block
import pytest

from privatelora.errors import RemoteProtocolError
from privatelora.runtime.payload.codec import CODEC_NAMES, plain_nbytes
from privatelora.runtime.training_session import TrainingLimits
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BatchSequence,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    Message,
    OpenSession,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
    TrainBegin,
)
from tests.fuzz.memory import CONSTANT_NBYTES, begin_peak, peak_since
from tests.unit.peers import RawCloud, raw_cloud, raw_edge
from tests.unit.world import ROOMY, serving, world

LZ4: Any = lz4.block  # ships without annotations
pytestmark = pytest.mark.usefixtures("traced")


def bomb(codec: str, rows: int, features: int) -> TensorPayload:
    """A million numbers, all of them zero."""
    data = LZ4.compress(bytes(plain_nbytes(codec, (rows, features))), store_size=False)
    return TensorPayload(codec, (rows, features), data)


each_compressing = pytest.mark.parametrize(
    "codec", [name for name in CODEC_NAMES if name.endswith("+lz4")]
)


@each_compressing
@pytest.mark.parametrize("where", ["rows", "hidden states", "opening", "y"])
async def test_a_cloud_unpacks_only_what_is_due(codec: str, where: str) -> None:
    split = world()
    async with serving(split.service().handle) as address, raw_edge(split, address) as edge:
        await edge.open(0)
        step = edge.begin(0, 0, 0, [1, 2])
        message: Message
        match where:
            case "rows":
                large = bomb(codec, 2**14, split.config.hidden_size)
                message = replace(step, hidden_states=large, opening=None)
            case "hidden states":
                message = replace(step, hidden_states=bomb(codec, 2, 2**19))
            case "opening":
                message = replace(step, opening=bomb(codec, 2, 2**19))
            case _:
                await edge.say(step)
                request = await edge.hear(ExchangeRequest)
                message = ExchangeReply(0, 0, request.point, bomb(codec, 2, 2**19))
        before = begin_peak()
        await edge.say(message)
        await edge.hear(ErrorReply)
        assert peak_since(before) < CONSTANT_NBYTES


@each_compressing
@pytest.mark.parametrize("where", ["rows", "hidden states", "opening", "y", "gradient", "z"])
async def test_a_cloud_unpacks_only_what_is_due_of_a_trainer(codec: str, where: str) -> None:
    split, large = world(), bomb(codec, 2, 2**19)
    service = split.service(replace(ROOMY, training=TrainingLimits(max_rows=64, max_sessions=1)))
    async with serving(service.handle) as address, raw_edge(split, address) as edge:
        await edge.say(OpenSession(0, 64, "fp32", "fp32", training=True))
        await edge.hear(SessionOpened)
        like = edge.begin(0, 0, 0, [1, 2])
        step = TrainBegin(0, 0, (BatchSequence(2, 2),), True, like.hidden_states, like.opening)
        message: Message
        match where:
            case "rows":
                rows = 2**14
                many = bomb(codec, rows, split.config.hidden_size)
                sequences = (BatchSequence(rows, 1),)
                message = replace(step, sequences=sequences, hidden_states=many, opening=None)
            case "hidden states":
                message = replace(step, hidden_states=large)
            case "opening":
                message = replace(step, opening=large)
            case "y":
                await edge.say(step)
                request = await edge.hear(ExchangeRequest)
                message = ExchangeReply(0, 0, request.point, large)
            case _:
                await edge.say(step)
                while isinstance(heard := await edge.hear(object), ExchangeRequest):
                    await edge.say(edge.answer(heard))
                assert isinstance(heard, StepEnd)
                message = BackwardBegin(0, 0, large)
                if where == "z":
                    await edge.say(BackwardBegin(0, 0, heard.hidden_states))
                    asked = await edge.hear(GradientRequest)
                    message = GradientReply(0, 0, asked.point, large)
        before = begin_peak()
        await edge.say(message)
        await edge.hear(ErrorReply)
        assert peak_since(before) < CONSTANT_NBYTES


@each_compressing
@pytest.mark.parametrize("kind", [ExchangeRequest, StepEnd])
async def test_an_edge_unpacks_only_what_is_due(codec: str, kind: type[Message]) -> None:
    large, before = bomb(codec, 2, 2**19), 0

    async def script(cloud: RawCloud) -> None:
        nonlocal before
        opened = await cloud.hear(OpenSession)
        await cloud.say(SessionOpened(opened.session_id, opened.max_positions))
        step = await cloud.hear(StepBegin)
        ids = step.session_id, step.step_id
        before = begin_peak()
        await cloud.say(
            StepEnd(*ids, large) if kind is StepEnd else ExchangeRequest(*ids, 1, large)
        )
        await cloud.listen_on()

    async with serving(raw_cloud(script)) as address:
        model = world().split(address)
        sequence = await model.open_sequence(8)
        with pytest.raises(RemoteProtocolError, match="due"):
            await sequence.forward([1, 2], 0, "last")
        assert peak_since(before) < CONSTANT_NBYTES
        await model.aclose()
