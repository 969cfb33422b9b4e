"""What split training says to its cloud and how often, and what a cloud does not take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from privatelora.errors import (
    CapacityError,
    ConfigError,
    ConnectError,
    PrivateLoRAError,
    RequestError,
)
from privatelora.partition.plan import Plan
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.training_session import TrainingLimits
from privatelora.runtime.wire.prelude import MAX_SEQUENCES
from privatelora.training.split.link import TrainingLink, open_training_link
from tests.training.split_rig import (
    TRAINING,
    Batch,
    Central,
    Trainer,
    assert_same_gradients,
    batch_of,
    training,
)
from tests.training.split_wire import Wires
from tests.unit.world import FP32, PRINTS, ROOMY, World, world

BATCH = batch_of([9, 4, 12])
NUM_ROWS = 9 + 4 + 12
HIDDEN = 64


def small(**plan_options: Any) -> World:
    return world("llama", layers="0-2", **plan_options)


def trains(trainer: Trainer, batch: Batch = BATCH) -> None:
    """It gives the gradients that it should."""
    expected = Central(trainer.split, "llama").gradients(batch)
    assert_same_gradients(trainer.gradients(batch), expected)


# What is said

PLANS: dict[str, dict[str, Any]] = {
    "per layer": {},
    "every 2": {"every": 2},
    "all": {"every": "all"},
    "one folded, one behind": {"every": 2, "edge_last": 1},
    "none folded": {"layers": "1,3"},
}


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_a_step_is_a_round_trip_for_every_point_and_one_each_way(options: dict[str, Any]) -> None:
    split = world("llama", **options)
    num_round_trips = 2 * (1 + len(split.plan.wire_points))
    with training(split) as trainer:
        trainer.gradients(BATCH)
        before = trainer.num_frames()
        trainer.gradients(BATCH)
        after = trainer.num_frames()
    assert [now - then for now, then in zip(after, before, strict=True)] == 2 * [num_round_trips]


def frame(header_nbytes: int, *tensors: int, table_nbytes: int = 0) -> int:
    """Size of a message: its header and table, each tensor at a multiple of 16, its checksum."""
    nbytes = 8 + header_nbytes + table_nbytes
    for tensor_nbytes in tensors:
        nbytes += -nbytes % 16 + tensor_nbytes
    return nbytes + 4


def step_nbytes(plan: Plan, rows: int, sequences: int, wanted: int) -> tuple[int, int]:
    """Bytes of a step forward and back in fp32, up and down."""
    hidden, of_wanted = 4 * rows * HIDDEN, 4 * wanted * HIDDEN
    opening = [4 * rows * len(plan.opening_layers) * plan.y_size] if plan.opening_layers else []
    of_input = [hidden] if plan.layers[0] < plan.cloud_layers.start else []
    z = 4 * rows * plan.z_size
    ys = [
        4 * rows * len(plan.span_in(point, plan.cloud_layers)) * plan.y_size
        for point in plan.wire_points
    ]
    up = frame(88, hidden, *opening, table_nbytes=8 * sequences) + frame(56, of_wanted)
    down = frame(56, of_wanted) + frame(88, *opening, *of_input)
    for y in ys:
        up += frame(56, y) + frame(56, z)
        down += frame(56, z) + frame(56, y)
    return up, down


@pytest.mark.parametrize("options", [{}, {"every": 2, "edge_first": 1, "edge_last": 1}])
def test_its_bytes_are_those_of_the_tensors_and_counted(options: dict[str, Any]) -> None:
    split = world("llama", **options)
    up, down = step_nbytes(split.plan, NUM_ROWS, 3, NUM_ROWS if split.plan.edge_last else 6)
    with training(split) as trainer:
        assert trainer.client.traffic == (0, 0)
        for num_steps in (1, 2):
            trainer.gradients(replace(BATCH, keep=2))
            assert trainer.client.traffic == (num_steps * up, num_steps * down)
        trainer.connections[-1].abort()  # and over several connections
        trainer.gradients(replace(BATCH, keep=2))
        assert trainer.client.traffic == (3 * up, 3 * down)
    assert trainer.client.traffic == (3 * up, 3 * down)


def test_no_rows_are_wanted_but_those_of_the_loss() -> None:
    split = world("llama")
    with training(split) as trainer:
        for keep in (1, 3, 9):
            before = trainer.client.traffic
            trainer.gradients(replace(BATCH, keep=keep))
            wanted = sum(min(length, keep) for length in (9, 4, 12))
            expected = step_nbytes(split.plan, NUM_ROWS, 3, wanted)
            spent = [now - then for now, then in zip(trainer.client.traffic, before, strict=True)]
            assert tuple(spent) == expected


# What a cloud does not take


def test_a_cloud_that_does_not_train_says_so() -> None:
    with (
        training(small(), ROOMY) as trainer,
        pytest.raises(RequestError, match="does not train: set training: in its file"),
    ):
        trainer.gradients(BATCH)


def test_a_cloud_that_is_not_there_is_not_waited_for() -> None:
    """Before it was there once: an address that is wrong is more likely."""
    with training(small(), listening=False) as trainer, pytest.raises(ConnectError):
        trainer.gradients(BATCH)


def test_a_batch_of_too_many_rows_is_refused_and_smaller_ones_go_on() -> None:
    limits = replace(TRAINING, training=TrainingLimits(max_rows=NUM_ROWS, max_sessions=1))
    with training(small(), limits) as trainer:
        for _ in range(2):
            with pytest.raises(RequestError, match=r"of 26 tokens .* this cloud takes \(25\)"):
                trainer.gradients(batch_of([9, 4, 13]))
            trains(trainer)


def test_a_batch_that_fits_into_no_message_is_refused_and_smaller_ones_go_on() -> None:
    with training(small(), max_frame_nbytes=2**17) as trainer:
        most = (2**17 - 4096 - 8 * MAX_SEQUENCES) // (4 * (HIDDEN + 24))
        lengths = [most // 2, most - most // 2]
        with pytest.raises(RequestError, match=f"of {most + 1} tokens .* at most {most} tokens"):
            trainer.gradients(batch_of([*lengths, 1]))
        trains(trainer, batch_of(lengths))


def test_what_the_cloud_takes_in_one_message_counts_too() -> None:
    with training(small(), replace(TRAINING, max_frame_nbytes=2**17)) as trainer:
        with pytest.raises(RequestError, match="a message of 131072 bytes"):
            trainer.gradients(batch_of([250, 200]))
        trains(trainer)


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with training(small()) as trainer:
        with pytest.raises(RequestError, match="257 positions is longer than the model's context"):
            trainer.gradients(batch_of([257, 3]))
        trains(trainer, batch_of([256, 3], keep=2))


BAD_BATCHES: dict[str, tuple[list[list[int]], list[list[int]], str]] = {
    "padding on the right": ([[5, 6, 7]], [[1, 1, 0]], "padding on the left"),
    "padding in the middle": ([[5, 6, 7]], [[1, 0, 1]], "padding on the left"),
    "nothing but padding": ([[5, 6], [7, 8]], [[1, 1], [0, 0]], "every row of a batch needs"),
    "no rows": ([], [], "every row of a batch needs"),
    "unknown token": ([[5, 199]], [[1, 1]], "token ids must lie in 0 to 198"),
    "negative token": ([[-1, 5]], [[1, 1]], "token ids must lie in 0 to 198"),
}


@pytest.mark.parametrize(("ids", "mask", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_batch_that_cannot_be_is_refused(
    ids: list[list[int]], mask: list[list[int]], message: str
) -> None:
    def tensor(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long).view(len(rows), -1 if rows else 3)

    with training(small()) as trainer:
        with pytest.raises(RequestError, match=message):
            trainer.model(tensor(ids), tensor(mask))
        assert trainer.connections == []


# Room for a few


def newcomer(trainer: Trainer) -> TrainingLink:
    """Another trainer at the same cloud."""
    opening = open_training_link(trainer.client_settings, PRINTS, NUM_ROWS)
    return trainer.client.thread.run(opening)


ALONE = replace(TRAINING, training=TrainingLimits(max_rows=NUM_ROWS, max_sessions=1))


def test_an_idle_trainer_loses_its_place_and_comes_back_by_itself() -> None:
    split = small()
    expected = Central(split, "llama").gradients(BATCH)
    with training(split, replace(ALONE, min_idle_s=1e-6)) as trainer:
        loss = BATCH.loss(trainer.model)
        other = newcomer(trainer)
        loss.backward()  # type: ignore[no-untyped-call]
        assert_same_gradients(trainer.found(), expected)
        assert not other.is_open, "it was idle in its turn"
        trainer.client.thread.run(other.aclose())


def test_a_trainer_that_is_not_idle_keeps_its_place() -> None:
    split = small()
    expected = Central(split, "llama").gradients(BATCH)
    with training(split, replace(ALONE, min_idle_s=60.0)) as trainer:
        loss = BATCH.loss(trainer.model)
        with pytest.raises(CapacityError, match="trains 1 sessions at once") as caught:
            newcomer(trainer)
        assert caught.value.retry_after_s == 60.0
        loss.backward()  # type: ignore[no-untyped-call]
        assert_same_gradients(trainer.found(), expected)
        assert len(trainer.connections) == 2, "its own, and that of the other"


def test_a_trainer_that_left_makes_room() -> None:
    with training(small(), replace(ALONE, min_idle_s=60.0)) as trainer:
        other = newcomer(trainer)
        with pytest.raises(CapacityError):
            trainer.gradients(BATCH)
        trainer.client.thread.run(other.aclose())
        trains(trainer)


# Numbers that burst


def huge(split: World) -> dict[Any, torch.Tensor]:
    return {key: torch.full_like(weight, 1e30) for key, weight in split.weights.items()}


def test_numbers_that_are_none_harm_nobody_else() -> None:
    split = small()
    with training(split) as trainer:
        trainer.load(huge(split))
        loss = BATCH.loss(trainer.model)
        assert not torch.isfinite(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        assert not all(torch.isfinite(gradient).all() for gradient in trainer.found().values())
        trainer.load(split.weights)
        trains(trainer)
        assert len(trainer.connections) == 1


@pytest.mark.parametrize(
    ("codecs", "error", "message"),
    [
        (replace(FP32, exchange_up="fp16"), ConfigError, "fp16 cannot carry"),
        (replace(FP32, exchange_down="int6"), PrivateLoRAError, "int6 cannot carry"),
        (replace(FP32, hidden_states_down="int12"), PrivateLoRAError, "int12 cannot carry"),
    ],
    ids=["on the way up", "z on the way down", "hidden states on the way down"],
)
def test_a_codec_that_cannot_carry_them_says_so_at_once(
    codecs: Codecs, error: type[Exception], message: str
) -> None:
    split = small()
    with training(split, codecs=codecs) as trainer:
        trainer.load(huge(split))
        with pytest.raises(error, match=message):
            trainer.gradients(BATCH)
        trainer.load(split.weights)
        expected = Central(split, "llama").gradients(BATCH)
        assert_same_gradients(trainer.gradients(BATCH), expected, 0.5)


# Whoever waits is interrupted


@pytest.mark.parametrize("num_frames", [2, 5, 8])
def test_ctrl_c_in_the_middle_of_a_step_leaves_nothing_behind(num_frames: int) -> None:
    main = threading.main_thread()
    assert threading.current_thread() is main
    wires = Wires()
    split = small()
    with training(split, wrap=wires) as trainer:
        trains(trainer)
        wires.after(num_frames, what=lambda _: signal.pthread_kill(main.ident or 0, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            trainer.gradients(BATCH)
        trains(trainer)
