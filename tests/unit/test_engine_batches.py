"""Steps of many sequences in one batch: each gives what it would have given alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from privatelora.benchmarks.baseline import attach_adapter
from privatelora.errors import LocalProtocolError
from privatelora.runtime.engine import Engine, Step
from privatelora.runtime.exchange import PrivateMatrices, run_locally
from privatelora.runtime.kv_cache import KVCache
from tests.e2e.reference import greedy_with_logits
from tests.partition.tiny import FAMILIES, tiny_model
from tests.unit.world import CPU, World, assert_same, world

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "per-layer": {},
    "every-2": {"every": 2},
    "every-all": {"every": "all"},
    "edge-both": {"every": 2, "edge_first": 2, "edge_last": 1},
    "span-over-both-borders": {"every": 3, "edge_first": 1, "edge_last": 1},
    "subset-grouped": {"every": 2, "layers": "0,2-3", "edge_first": 1},
    "two-targets": {"targets": "q,v", "scaling": 0.5},
}
PROMPTS = [
    [1, *range(20, 58)],
    [5],
    [1, *range(90, 60, -2)],
    [7, 9, 11],
    list(range(150, 190)),
]
NUM_TOKENS = 6


@dataclass
class Flight:
    """A step on its way through one engine after another."""

    step: Step
    stage: int = 0

    @property
    def place(self) -> tuple[int, int, bool]:
        """Engine, layer, and whether it has waited there for a reply."""
        return self.stage, self.step.layer_idx, self.step.z is not None


@dataclass
class Conversation:
    """Greedy decoding of one prompt, which is sent in chunks, all at once."""

    caches: list[KVCache]
    prompt: list[int]
    flights: list[Flight] = field(default_factory=list)
    """In order of their positions."""
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class Walk:
    """Conversations that share engines, in batches that chance puts together."""

    def __init__(
        self, split: World, choice: random.Random, device: torch.device = CPU, **engine: Any
    ) -> None:
        plan = split.plan
        sides = (plan.edge_first_layers, plan.cloud_layers, plan.edge_last_layers)
        self.engines = [split.engine(side, device=device, **engine) for side in sides if side]
        self.pools = [engine.new_pool(256) for engine in self.engines]
        self.ends = split.ends()
        self.matrices = PrivateMatrices(plan, split.weights, device)
        self.choice = choice
        self.conversations: list[Conversation] = []
        self.largest_batch = 0

    def start(self, prompt: list[int]) -> None:
        caches = [pool.open(len(prompt) + NUM_TOKENS) for pool in self.pools]
        conversation = Conversation(caches, prompt)
        self.conversations.append(conversation)
        cuts = sorted(self.choice.sample(range(1, len(prompt)), min(2, len(prompt) - 1)))
        for start, end in zip([0, *cuts], [*cuts, len(prompt)], strict=True):
            self.begin(conversation, prompt[start:end], start)

    def begin(self, conversation: Conversation, tokens: list[int], position: int) -> None:
        step = self.engines[0].begin(self.ends.embed(tokens), position, conversation.caches[0])
        conversation.flights.append(Flight(step))

    def turn(self) -> None:
        """Run some of the steps that may run at some place."""
        flights = [flight for talk in self.conversations for flight in talk.flights]
        stage, *_ = place = self.choice.choice([flight.place for flight in flights])
        batch: list[tuple[Conversation, Flight]] = []
        for conversation in self.choice.sample(self.conversations, len(self.conversations)):
            for flight in conversation.flights:
                if flight.place < place or (flight.place == place and self.choice.random() < 0.2):
                    break  # those behind it may not pass it
                if flight.place == place:
                    batch.append((conversation, flight))
        if not batch:
            return
        self.largest_batch = max(self.largest_batch, len(batch))
        engine, steps = self.engines[stage], [flight.step for _, flight in batch]
        point = engine.advance_batch(steps)
        if point is None:
            for conversation, flight in batch:
                self.finish(conversation, flight)
            return
        engine.precompute_batch(self.choice.sample(steps, self.choice.randint(0, len(steps))))
        for step in steps:
            assert step.z is not None
            step.supply(point.layers, self.matrices.reply(point, step.z).to(engine.dtype))

    def finish(self, conversation: Conversation, flight: Flight) -> None:
        """Hand a step to the engine behind, or its logits to the conversation."""
        step, position = flight.step, flight.step.context.position
        if flight.stage + 1 < len(self.engines):
            flight.stage += 1
            kv = conversation.caches[flight.stage]
            flight.step = self.engines[flight.stage].begin(step.hidden_states, position, kv)
            flight.step.y = step.y
            return
        conversation.flights.remove(flight)
        conversation.logits.append(self.ends.logits(step.hidden_states.cpu()))
        position += step.context.num_positions
        if position >= len(conversation.prompt) and len(conversation.tokens) < NUM_TOKENS:
            conversation.tokens.append(int(conversation.logits[-1][-1].argmax()))
            if len(conversation.tokens) < NUM_TOKENS:
                self.begin(conversation, conversation.tokens[-1:], position)

    def run(self, prompts: Sequence[list[int]]) -> None:
        """Begin each prompt at some time, and run all to their ends."""
        waiting = list(prompts)
        while waiting or any(talk.flights for talk in self.conversations):
            idle = not any(talk.flights for talk in self.conversations)
            if waiting and (idle or self.choice.random() < 0.5):
                self.start(waiting.pop())
            self.turn()


def reference(split: World, family: str) -> Any:
    return attach_adapter(tiny_model(family), split.plan, split.tensors, split.weights)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_give_what_transformers_gives(family: str, arrangement: str) -> None:
    split = world(family, **ARRANGEMENTS[arrangement])
    model = reference(split, family)
    walk = Walk(split, random.Random(f"{family} {arrangement}"))
    walk.run(PROMPTS)
    assert walk.largest_batch > 3
    for conversation in walk.conversations:
        tokens, logits = greedy_with_logits(model, conversation.prompt, NUM_TOKENS)
        assert conversation.tokens == tokens
        assert_same(torch.cat(conversation.logits), logits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_whatever_the_batches_are(family: str, seed: int) -> None:
    split = world(family)
    walk = Walk(split, random.Random(seed))
    walk.run(PROMPTS[:3])
    alone = Walk(split, random.Random(0))
    for conversation in walk.conversations:
        alone.run([conversation.prompt])
        expected = alone.conversations[-1]
        assert conversation.tokens == expected.tokens
        # float32 keeps some 7 digits; sums in another order differ in the last two.
        found, due = torch.cat(conversation.logits), torch.cat(expected.logits)
        torch.testing.assert_close(found, due, rtol=0, atol=1e-5 * due.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_half_precision_is_close(family: str, dtype: torch.dtype) -> None:
    split = world(family)
    walk = Walk(split, random.Random(0), dtype=dtype)
    walk.run(PROMPTS)
    model = reference(split, family)
    for conversation in walk.conversations:
        texts = conversation.prompt + conversation.tokens[:-1]
        with torch.inference_mode():
            expected = model(torch.tensor([texts])).logits[0]
        found = torch.cat(conversation.logits)
        tolerance = expected.abs().max().item() * (0.01 if dtype is torch.float16 else 0.12)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_cuda_equals_cpu(family: str) -> None:
    split = world(family)
    walk = Walk(split, random.Random(0), device=torch.device("cuda"))
    walk.run(PROMPTS)
    model = reference(split, family)
    for conversation in walk.conversations:
        tokens, logits = greedy_with_logits(model, conversation.prompt, NUM_TOKENS)
        assert conversation.tokens == tokens
        torch.testing.assert_close(torch.cat(conversation.logits), logits, rtol=0, atol=1e-3)


# Batches that cannot be


def waiting_step(engine: Engine, split: World, tokens: list[int], kv: KVCache | None) -> Step:
    """A step that has its reply for the first exchange point."""
    position = 0 if kv is None else 4
    kv = kv or engine.new_cache(16)
    step = engine.begin(split.ends().embed(tokens), position, kv)
    answer(engine, split, step)
    return step


def answer(engine: Engine, split: World, step: Step) -> None:
    point = engine.advance(step)
    assert point is not None
    assert step.z is not None
    step.supply(point.layers, split.matrices().reply(point, step.z))


def test_steps_that_cannot_run_together() -> None:
    split = world()
    engine = split.engine()
    step = waiting_step(engine, split, PROMPTS[0][:4], None)
    next_step = waiting_step(engine, split, [9], step.context.kv)
    further = waiting_step(engine, split, [9], None)
    answer(engine, split, further)
    unanswered = engine.begin(split.ends().embed([3]), 0, engine.new_cache(1))
    engine.advance(unanswered)
    for steps, message in [
        ([], "at least one"),
        ([step, further], "layers 0 and 1"),
        ([step, unanswered], "replies for other layers"),
        ([unanswered], "no reply yet for layer 0"),
        ([next_step, step], "in order"),
        ([step, step], "in order"),
    ]:
        with pytest.raises(LocalProtocolError, match=message):
            engine.advance_batch(steps)
    # Refusing them has changed nothing: they still run as they should.
    engine.advance_batch([step, next_step])
    whole = engine.begin(split.ends().embed([*PROMPTS[0][:4], 9]), 0, engine.new_cache(5))
    answer(engine, split, whole)
    engine.advance(whole)
    found = torch.cat([step.hidden_states, next_step.hidden_states])
    assert_same(found, whole.hidden_states)


def test_a_finished_batch_stays_finished() -> None:
    split = world()
    engine = split.engine()
    steps = [
        engine.begin(split.ends().embed(tokens), 0, engine.new_cache(8))
        for tokens in ([4, 5], [6], [7, 8, 9])
    ]
    for step in steps:
        run_locally(engine, step, split.matrices())
    before = [step.hidden_states for step in steps]
    assert engine.advance_batch(steps) is None
    assert all(torch.equal(s.hidden_states, rows) for s, rows in zip(steps, before, strict=True))
