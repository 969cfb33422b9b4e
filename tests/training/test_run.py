"""Whole training runs of a tiny model, from a file of settings to what they leave."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from privatelora.errors import ConfigError, TrainingError
from privatelora.partition.adapter import read_adapter
from privatelora.training import trainer
from privatelora.training.config import read_train_config
from privatelora.training.methods import TrainableM
from privatelora.training.run import Outcome, run_training
from privatelora.training.trainer import StopGently
from tests.partition.tiny import save_tiny

LINES = [{"prompt": f"Say {word}!", "completion": word * 2} for word in "abcdefghij"]
METHODS: dict[str, dict[str, Any]] = {
    "privatelora": {"name": "privatelora", "rank_up": 8, "rank_down": 8, "every": 2},
    "trained-basis": {"name": "privatelora", "rank_up": 8, "rank_down": 8, "train_basis": True},
    "lora": {"name": "lora", "rank": 4},
    "full": {"name": "full"},
}
RATES = {"privatelora": 2e-2, "trained-basis": 2e-2, "lora": 1e-2, "full": 1e-3}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write settings for a short run of a tiny model; keys given replace others."""
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, LINES)))

    def write(name: str = "run", *, trainer: dict[str, Any] | None = None, **keys: Any) -> Path:
        settings: dict[str, Any] = {
            "model": str(tmp_path / "model"),
            "out": f"out-{name}",
            "method": METHODS["privatelora"],
            "data": {"train": [{"kind": "jsonl", "path": "data.jsonl"}], "render": "text"},
            "retention": {"num_replay": 4, "num_held_out": 4, "max_answer_tokens": 4},
            "trainer": {
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "save_steps": 2,
                **(trainer or {}),
            },
            **keys,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def run(path: Path, **options: Any) -> Outcome:
    return run_training(read_train_config(path), **options)


def losses(outcome: Outcome) -> list[float]:
    return [entry["loss"] for entry in outcome.results["log"] if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_leaves_what_serves(write: Write, method: str) -> None:
    trainer = {"max_steps": 80, "learning_rate": RATES[method], "save_steps": 80}
    outcome = run(write(method=METHODS[method], trainer=trainer))
    curve = losses(outcome)
    assert len(curve) == 80
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    assert all(path.exists() for path in outcome.written.values())
    assert outcome.results["after"]["retention"]["num_prompts"] == 4
    assert outcome.results["after"]["retention"]["kl"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    write: Write, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(write("whole", method=METHODS[method]))
    path = write("cut", method=METHODS[method])
    with monkeypatch.context() as patch:
        patch.setattr(StopGently, "on_step_end", _stop_after(3))
        cut = run(path)
    assert cut.results["stopped_early"]
    assert cut.results["steps"] == 3
    with pytest.raises(ConfigError, match="checkpoints of another run; add --resume"):
        run(path)
    again = run(path, resume=True)
    assert losses(again) == losses(whole)
    assert not again.results["stopped_early"]


def test_a_checkpoint_that_was_cut_off_is_passed_over(write: Write) -> None:
    path = write()
    run(path)
    checkpoints = path.parent / "out-run" / "checkpoints"
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    again = run(path, resume=True)
    steps = [entry["step"] for entry in again.results["log"] if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (checkpoints / "checkpoint-6" / "trainer_state.json").exists()


def _stop_after(num_steps: int) -> Callable[..., None]:
    """Somebody presses Ctrl-C in this step."""

    def on_step_end(self: StopGently, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == num_steps:
            self.was_asked = control.should_save = control.should_training_stop = True

    return on_step_end


def test_the_curve_is_in_tensorboards_files(write: Write) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = write()
    outcome = run(path)
    events = EventAccumulator(str(path.parent / "out-run" / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("train/loss")]
    assert found == pytest.approx(losses(outcome))
    assert "train/kl_to_base" in events.Tags()["scalars"]


def test_replayed_rows_are_run_apart_and_count_the_same(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = losses(run(write("apart")))
    shapes = []
    true_loss = trainer.answer_loss

    def noting(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.append(logits.shape[0])
        return true_loss(logits, *args)

    monkeypatch.setattr(trainer, "answer_loss", noting)
    run(write("counted"))
    assert shapes == [3, 1] * 6
    monkeypatch.setattr(TrainableM, "packs", True)
    assert losses(run(write("together"))) == pytest.approx(apart, rel=1e-5)
    assert shapes[12:] == [4] * 6


def test_questions_that_are_trained_on_are_no_silent_measure(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"kind": "jsonl", "path": "data.jsonl"}
    run(write(data={"train": [source], "evaluate": {"own": [dict(source)]}, "render": "text"}))
    assert "10 of the 10 questions of evaluate: own are trained on word for word" in caplog.text


def test_nothing_is_replayed_or_measured_without_retention(write: Write) -> None:
    outcome = run(write(retention=None))
    assert outcome.results["after"] == {}
    assert not any("kl_to_base" in entry for entry in outcome.results["log"])


def test_a_loss_that_is_not_a_number_ends_the_run_and_loses_nothing(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    true_loss = trainer.answer_loss
    monkeypatch.setattr(
        trainer,
        "answer_loss",
        lambda *args: true_loss(*args) * (math.nan if next(calls) == 8 else 1.0),
    )
    path = write()
    with pytest.raises(TrainingError, match=r"step 5: the loss is nan.*what 4 steps have trained"):
        run(path)
    adapter = read_adapter(path.parent / "out-run" / "adapter.safetensors")
    assert any(bool(weight.any()) for weight in adapter.weights.values())


def test_a_gradient_that_is_not_finite_changes_no_weight(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Burst(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * math.inf

    true_loss = trainer.answer_loss
    monkeypatch.setattr(trainer, "answer_loss", lambda *args: Burst.apply(true_loss(*args)))
    path = write()
    with pytest.raises(TrainingError, match=r"step 1: the gradient of .* is not finite"):
        run(path)
    assert not (path.parent / "out-run" / "adapter.safetensors").exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"methid": {}}, "unknown key 'methid'; did you mean method"),
    "misspelt inside": (
        {"method": {"name": "privatelora", "evrey": 2}},
        "unknown key .*evrey.*; did you mean every",
    ),
    "misspelt argument": (
        {"trainer": {"max_step": 3}},
        "trainer: unknown argument 'max_step' of the Trainer; did you mean max_steps",
    ),
    "own argument": ({"seed": 1}, "seed follows from seed; leave it out"),
    "split without an edge": ({"mode": "split", "model": None}, "needs the YAML file of an edge"),
    "no such model": ({"model": "nowhere/at-all.gguf"}, "nowhere/at-all.gguf"),
    "no such file": (
        {"data": {"train": [{"kind": "jsonl", "path": "none.jsonl"}]}},
        "cannot read .*none.jsonl: No such file",
    ),
    "too long": (
        {
            "data": {
                "train": [{"kind": "jsonl", "path": "data.jsonl"}],
                "render": "text",
                "max_length": 3,
            }
        },
        r"data.jsonl line 1: \d+ tokens, and 3 is the most; shorten it, or set on_too_long: drop",
    ),
    "batch of one": (
        {"trainer": {"per_device_train_batch_size": 1}},
        "use a batch size of at least 2, or a replay_share of 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_clear_line(write: Write, case: str) -> None:
    keys, message = BAD[case]
    path = write(trainer=keys) if case == "own argument" else write(**keys)
    with pytest.raises(Exception, match=message) as caught:
        run(path)
    assert type(caught.value).__module__ == "privatelora.errors"
    assert "\n" not in str(caught.value)
