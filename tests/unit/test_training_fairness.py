"""Conversations are answered beside a trainer, and the trainer goes on beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from privatelora.runtime import training_engine
from privatelora.runtime.scheduler import Batch
from privatelora.runtime.tensors import pack
from privatelora.runtime.training_session import TrainingLimits
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    BatchSequence,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    OpenSession,
    SessionOpened,
    StepEnd,
    TrainBegin,
)
from tests.unit.peers import RawEdge, raw_edge, tensor
from tests.unit.waiting import settled
from tests.unit.world import ROOMY, World, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

LIMITS = replace(ROOMY, max_batch_rows=16, training=TrainingLimits(max_rows=512, max_sessions=4))
PROMPT = [1, *range(20, 40)]
STEPS = [PROMPT[:-8], *([token] for token in PROMPT[-8:])]
"""A prompt, and a token at a time."""
SEQUENCES = [16] * 12
"""Of a trainer's batch: as many slices for each layer."""


class Engine:
    """Counts what an engine computes: batches of conversations, and training's slices."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.num_slices = 0
        self.between_batches: list[int] = []
        """How many slices before each batch, since the one before it."""
        self._at_last_batch = 0
        run_layer = training_engine.run_layer

        def count(*args: Any) -> torch.Tensor:
            self.num_slices += 1
            return run_layer(*args)

        patch.setattr(training_engine, "run_layer", count)

    def note_batch(self, _batch: Batch, _started: float, _ended: float) -> None:
        self.between_batches.append(self.num_slices - self._at_last_batch)
        self._at_last_batch = self.num_slices

    def note_wait(self, *_: object) -> None:
        pass


async def train(edge: RawEdge, session_id: int) -> None:
    """Step after step, until it is cancelled."""
    split, num_rows = edge.world, sum(SEQUENCES)
    plan, config = split.plan, split.config
    sequences = tuple(BatchSequence(length, length) for length in SEQUENCES)
    generator = torch.Generator().manual_seed(0)
    hidden_states = pack(torch.randn(num_rows, config.hidden_size, generator=generator), "fp32")
    await edge.say(OpenSession(session_id, num_rows, "fp32", "fp32", training=True))
    await edge.hear(SessionOpened)
    step_id = 0
    while True:
        opening = tensor(num_rows, plan.y_size * len(plan.opening_layers))
        await edge.say(TrainBegin(session_id, step_id, sequences, True, hidden_states, opening))
        for _ in plan.wire_points:
            await edge.say(edge.answer(await edge.hear(ExchangeRequest)))
        ended = await edge.hear(StepEnd)
        await edge.say(BackwardBegin(session_id, step_id, ended.hidden_states))
        for _ in plan.wire_points:
            asked = await edge.hear(GradientRequest)
            of_z = tensor(num_rows, plan.z_size)
            await edge.say(GradientReply(session_id, step_id, asked.point, of_z))
        await edge.hear(BackwardEnd)
        step_id += 1


@asynccontextmanager
async def trainers(split: World, address: str, num: int) -> AsyncIterator[None]:
    """So many of them at work."""
    async with raw_edge(split, address) as edge, raw_edge(split, address) as other:
        tasks = [asyncio.create_task(train(one, 0)) for one in (edge, other)[:num]]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


@pytest.mark.parametrize("num_trainers", [1, 2])
async def test_a_conversation_waits_for_one_slice_at_most(
    num_trainers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, engine = world(), Engine(monkeypatch)
    expected = await solo(split.unsplit(), *STEPS)
    service = split.service(LIMITS, engine)
    async with serving(service.handle) as address, trainers(split, address, num_trainers):
        await settled(lambda: engine.num_slices > 0)
        model = split.split(address)
        logits = await solo(model, *STEPS)
        await model.aclose()
    assert_same(logits, expected)
    first, *others = engine.between_batches
    assert first > 0
    assert len(others) >= 3 * len(STEPS), "each step has a batch before and behind each point"
    assert max(others) <= 1
    assert sum(others) >= len(STEPS) / 2, "training went on meanwhile"


async def test_trainers_take_no_memory_that_conversations_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A conversation that fills the whole cache fits in beside them, and is not evicted."""
    split, engine = world(), Engine(monkeypatch)
    limits = replace(LIMITS, max_cached_positions=len(PROMPT), max_sessions=3, min_idle_s=1e-6)
    service = split.service(limits, engine)
    get = service.metrics.registry.get_sample_value
    async with serving(service.handle) as address, trainers(split, address, 2):
        await settled(lambda: engine.num_slices > 20)
        assert get("privatelora_cloud_kv_blocks_used") == 0
        model = split.split(address)
        assert_same(await solo(model, *STEPS), await solo(split.unsplit(), *STEPS))
        await model.aclose()
        assert get("privatelora_cloud_sessions_evicted_total") == 0
