"""Gradients of M through a cloud are those of training in one place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from privatelora.runtime.codecs import Codecs
from privatelora.runtime.wire.prelude import MAX_TRAINING_STEPS
from tests.e2e.test_equality import ARRANGEMENTS
from tests.partition.tiny import FAMILIES
from tests.training.split_rig import (
    TRAINING,
    Batch,
    Central,
    Trainer,
    assert_same_gradients,
    batch_of,
    training,
)
from tests.unit.world import FP16, World, world

BATCH = batch_of([23, 5, 40, 1, 17, 9, 40])
"""Of many lengths, some beyond the sliding window of mistral, which is 16."""
BATCHES = [batch_of([12, 30], seed=1), batch_of([7, 7, 3], seed=2), batch_of([20], seed=3)]

OF_EVERY_FAMILY = ("per-layer", "edge-both", "span-over-both-borders")
"""What is left of ``ARRANGEMENTS`` differs in nothing that is another family's."""
CASES = [
    (family, name)
    for family in FAMILIES
    for name in ARRANGEMENTS
    if family == "llama" or name in OF_EVERY_FAMILY
]

PLACES: dict[str, dict[str, Any]] = {
    "before the cloud's": {"edge_first": 2, "layers": "0-1"},
    "before and on the cloud": {"edge_first": 1, "layers": "0,2", "every": 1},
    "on the cloud, not its first": {"layers": "2"},
    "behind the cloud's, asked by it": {"edge_last": 1, "layers": "2-3", "every": 2},
    "behind the cloud's": {"edge_last": 1, "layers": "3"},
    "on both sides of the cloud's": {"edge_first": 1, "edge_last": 1, "layers": "0,3"},
}


def small(**plan_options: Any) -> World:
    """Two points that the cloud asks for, one folded: enough for whatever is not arithmetic."""
    return world("llama", layers="0-2", **plan_options)


@pytest.mark.parametrize(("family", "arrangement"), CASES)
def test_they_are_those_of_training_in_one_place(family: str, arrangement: str) -> None:
    split = world(family, **ARRANGEMENTS[arrangement])
    with training(split) as trainer:
        found = trainer.gradients(BATCH)
    assert_same_gradients(found, Central(split, family).gradients(BATCH))


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
def test_adapted_layers_may_lie_anywhere(options: dict[str, Any]) -> None:
    split = world("llama", **options)
    with training(split) as trainer:
        found = trainer.gradients(BATCH)
    assert_same_gradients(found, Central(split, "llama").gradients(BATCH))


@pytest.mark.parametrize("max_batch_rows", [1, 24, 64])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_the_size_of_slices_changes_no_gradient(family: str, max_batch_rows: int) -> None:
    split = world(family, **ARRANGEMENTS["edge-both"])
    with training(split, replace(TRAINING, max_batch_rows=max_batch_rows)) as trainer:
        found = trainer.gradients(BATCH)
    assert_same_gradients(found, Central(split, family).gradients(BATCH))


@pytest.mark.parametrize("arrangement", ["per-layer", "edge-last-1"])
def test_the_loss_may_be_on_the_last_positions_alone(arrangement: str) -> None:
    split = world("llama", **ARRANGEMENTS[arrangement])
    batch = replace(BATCH, keep=6)  # more than the shortest has
    with training(split) as trainer:
        found = trainer.gradients(batch)
        logits = trainer.model(batch.input_ids, batch.attention_mask, logits_to_keep=6).logits
    central = Central(split, "llama")
    assert_same_gradients(found, central.gradients(batch))
    expected = central.model(batch.input_ids, batch.attention_mask, logits_to_keep=6).logits
    is_token = batch.attention_mask[:, -6:].bool()
    torch.testing.assert_close(logits[is_token], expected[is_token], rtol=0, atol=1e-4)
    assert not logits[~is_token].any()


def test_they_accumulate_over_batches() -> None:
    split = small()
    with training(split) as trainer:
        found = trainer.gradients(*BATCHES)
        assert len(trainer.connections) == 1, "a larger batch comes first"
    assert_same_gradients(found, Central(split, "llama").gradients(*BATCHES))


def test_they_accumulate_over_batches_that_grow() -> None:
    """Which needs another session each time, for as many rows."""
    split = small()
    growing = sorted(BATCHES, key=lambda batch: batch.num_rows)
    with training(split) as trainer:
        found = trainer.gradients(*growing)
        assert len(trainer.connections) == len(growing)
    assert_same_gradients(found, Central(split, "llama").gradients(*BATCHES))


ORDERS = {"as they came": (0, 1), "the last first": (1, 0), "more than the cloud keeps": (0, 1, 2)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_steps_may_be_kept_while_others_begin(order: tuple[int, ...]) -> None:
    split = small()
    with training(split) as trainer:
        found = kept_and_gone_back(trainer, BATCHES[: len(order)], order)
    assert_same_gradients(found, Central(split, "llama").gradients(*BATCHES[: len(order)]))


def kept_and_gone_back(trainer: Trainer, batches: list[Batch], order: tuple[int, ...]) -> Any:
    losses = [batch.loss(trainer.model) for batch in batches]
    for index in order:
        losses[index].backward()  # type: ignore[no-untyped-call]
    return trainer.found()


def test_a_step_can_be_gone_back_through_twice() -> None:
    """Its second time the cloud has nothing of it any more, and it is run again."""
    split = small()
    with training(split) as trainer:
        loss = BATCH.loss(trainer.model)
        for _ in range(2):
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        found = trainer.found()
    assert_same_gradients(found, Central(split, "llama").gradients(BATCH, BATCH))


def test_what_m_was_in_the_forward_pass_counts() -> None:
    """Whatever an optimiser does before the backward pass, if the step has to be run again too."""
    split = small()
    expected = Central(split, "llama").gradients(BATCH)
    with training(split) as trainer:
        loss = BATCH.loss(trainer.model)
        trainer.load({key: weight + 1 for key, weight in split.weights.items()})
        trainer.connections[-1].abort()
        loss.backward()  # type: ignore[no-untyped-call]
        assert_same_gradients(trainer.found(), expected)


def test_steps_that_nobody_goes_back_through_are_dropped() -> None:
    split = small()
    with training(split) as trainer:
        for _ in range(2 * MAX_TRAINING_STEPS):
            BATCH.loss(trainer.model)
        with torch.no_grad():
            for _ in range(2 * MAX_TRAINING_STEPS):
                BATCH.loss(trainer.model)
        found = trainer.gradients(BATCH)
        assert len(trainer.connections) == 1
    assert_same_gradients(found, Central(split, "llama").gradients(BATCH))


CODECS = {
    "fp16": (FP16, 0.01),
    "bf16": (Codecs("bf16", "bf16", "bf16", "bf16"), 0.1),
    "int8": (Codecs("int8", "int8", "int12", "int8"), 0.2),
    "lz4": (Codecs("fp32+lz4", "fp32+lz4", "fp32+lz4", "fp32+lz4"), 1e-5),
}


@pytest.mark.parametrize(("codecs", "tolerance"), CODECS.values(), ids=CODECS)
def test_they_travel_in_any_codec(codecs: Codecs, tolerance: float) -> None:
    split = small()
    with training(split, codecs=codecs) as trainer:
        found = trainer.gradients(BATCH)
    assert_same_gradients(found, Central(split, "llama").gradients(BATCH), tolerance)


def test_small_ones_are_not_lost_in_fp16() -> None:
    """Whose smallest number is 6e-8, and a mean over many tokens has smaller gradients."""
    split, scale = small(), 1e-9
    expected = Central(split, "llama").gradients(BATCH)
    with training(split, codecs=FP16) as trainer:
        (scale * BATCH.loss(trainer.model)).backward()
        found = {key: gradient / scale for key, gradient in trainer.found().items()}
    assert_same_gradients(found, expected, 0.05)
