"""Trainers driven message by message, at a cloud with two points that it asks for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import torch

from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.training_session import TrainingLimits
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    BatchSequence,
    ErrorReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    OpenSession,
    SessionOpened,
    StepEnd,
    TrainBegin,
)
from tests.unit.peers import RawEdge, raw_edge, tensor
from tests.unit.world import CPU, ROOMY, World, world

LIMITS = replace(ROOMY, training=TrainingLimits(max_rows=512, max_sessions=2))
LENGTHS = (5, 1, 4)
N, WANTED = sum(LENGTHS), 2 * 3 - 1
# The tiny model's hidden size, and with three targets and ranks of 8 the sizes of z and y.
HIDDEN, Z, Y = 64, 24, 24


def small() -> World:
    """Two points that the cloud asks for, and one folded."""
    return world(layers="0-2")


def begin(step_id: int = 0, *, session_id: int = 0, **changes: Any) -> TrainBegin:
    """A step of three sequences of which the last two rows are wanted."""
    message = TrainBegin(
        session_id,
        step_id,
        tuple(BatchSequence(length, min(length, 2)) for length in LENGTHS),
        True,
        pack(torch.linspace(-1, 1, N * HIDDEN).view(N, HIDDEN), "fp32"),
        tensor(N, Y),
    )
    return replace(message, **changes)


def back(step_id: int = 0, *, session_id: int = 0) -> BackwardBegin:
    return BackwardBegin(session_id, step_id, pack(torch.ones(WANTED, HIDDEN), "fp32"))


async def open_training(
    edge: RawEdge, session_id: int = 0, max_rows: int = 512
) -> SessionOpened | ErrorReply:
    """What the cloud says to a trainer that wants in."""
    await edge.say(OpenSession(session_id, max_rows, "fp32", "fp32", training=True))
    message: SessionOpened | ErrorReply = await edge.hear(object)
    assert isinstance(message, SessionOpened | ErrorReply)
    return message


@asynccontextmanager
async def trainer(split: World, address: str) -> AsyncIterator[RawEdge]:
    """One that is in."""
    async with raw_edge(split, address) as edge:
        assert isinstance(await open_training(edge), SessionOpened)
        yield edge


async def forward(edge: RawEdge, message: TrainBegin) -> StepEnd:
    await edge.say(message)
    for _ in edge.world.plan.wire_points:
        await edge.say(edge.answer(await edge.hear(ExchangeRequest)))
    return await edge.hear(StepEnd)


async def backward(edge: RawEdge, message: BackwardBegin) -> BackwardEnd:
    await edge.say(message)
    for _ in edge.world.plan.wire_points:
        asked = await edge.hear(GradientRequest)
        await edge.say(GradientReply(asked.session_id, asked.step_id, asked.point, tensor(N, Z)))
    return await edge.hear(BackwardEnd)


async def train(edge: RawEdge, step_id: int = 0, session_id: int = 0) -> torch.Tensor:
    """A step forward and back; the gradient of what opened it."""
    await forward(edge, begin(step_id, session_id=session_id))
    ended = await backward(edge, back(step_id, session_id=session_id))
    assert ended.opening is not None
    return unpack(ended.opening, CPU, torch.float32)
