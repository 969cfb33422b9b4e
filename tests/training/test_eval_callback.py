"""The evaluation callback in real training runs: what it logs, and that it changes nothing."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from privatelora.errors import ConfigError
from privatelora.training.eval import EvalHarnessCallback, load_tasks
from tests.partition.tiny import tiny_model, tiny_tokenizer

# The harness and what it imports warn of much.
pytestmark = pytest.mark.filterwarnings("ignore")

TASK = "small_things"
TASK_YAML = """
task: small_things
dataset_path: json
dataset_kwargs:
  data_files: {test: items.jsonl}
  cache_dir: CACHE
test_split: test
output_type: multiple_choice
doc_to_text: "{{sentence}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
GENERATING_YAML = """
task: small_answers
dataset_path: json
dataset_kwargs:
  data_files: {test: items.jsonl}
  cache_dir: CACHE
test_split: test
output_type: generate_until
doc_to_text: "{{sentence}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 3, do_sample: true, temperature: 1.0, until: ["."]}
metric_list:
  - metric: exact_match
filter_list:
  - name: first-word
    filter:
      - function: regex
        regex_pattern: "(\\\\w+)"
      - function: take_first
"""
ITEMS = [
    {"sentence": "apples grow on", "choices": ["trees", "rivers"], "answer": 0},
    {"sentence": "snow is", "choices": ["hot", "cold"], "answer": 1},
    {"sentence": "two and two is", "choices": ["four", "nine"], "answer": 0},
    {"sentence": "the sun is", "choices": ["dark", "bright"], "answer": 1},
]


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    return write_task(tmp_path / "tasks", TASK_YAML)


def write_task(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    name = text.split()[1]
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("CACHE", str(folder.parent / "cache")))
    return path


def make_trainer(out: Path, model: Any = None, **changes: Any) -> Any:
    """A Trainer whose every step takes random numbers: shuffling and attention dropout."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, 199, (16, 12), generator=generator).tolist()
    options: dict[str, Any] = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return Trainer(
        model=tiny_model("llama", attention_dropout=0.2) if model is None else model,
        args=TrainingArguments(output_dir=str(out), **options),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],  # type: ignore[arg-type]
    )


def train(
    trainer: Any, tasks: Sequence[str | Path], *, resume: str | None = None, **options: Any
) -> list[dict[str, Any]]:
    if tasks:
        trainer.add_callback(
            EvalHarnessCallback(
                trainer=trainer,
                tokenizer=tiny_tokenizer(),
                tasks=[str(task) for task in tasks],
                **options,
            )
        )
    trainer.train(resume_from_checkpoint=resume)
    history: list[dict[str, Any]] = trainer.state.log_history
    return history


def evaluated_steps(history: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in history if f"eval_harness/{TASK}/acc" in row]


def losses(history: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def test_a_curve_in_the_log_history_and_in_tensorboard(tmp_path: Path, task_file: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path / "out", report_to=["tensorboard"])
    history = train(trainer, [task_file], eval_steps=2, eval_start=1, eval_batch_size=3)
    assert evaluated_steps(history) == [0, 1, 3, 5]
    rows = [row for row in history if f"eval_harness/{TASK}/acc" in row]
    assert all(0 <= row[f"eval_harness/{TASK}/acc"] <= 1 for row in rows)
    assert all(row[f"eval_harness/{TASK}/acc_stderr"] >= 0 for row in rows)

    [folder] = {path.parent for path in tmp_path.glob("out/**/events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    for metric in ("acc", "acc_stderr"):
        curve = [(e.step, e.value) for e in events.Scalars(f"eval/harness/{TASK}/{metric}")]
        assert [step for step, _ in curve] == [0, 1, 3, 5]
        assert [value for _, value in curve] == pytest.approx(
            [row[f"eval_harness/{TASK}/{metric}"] for row in rows]
        )


def test_the_scores_are_those_of_the_model_at_that_step(tmp_path: Path, task_file: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    trainer = make_trainer(tmp_path / "out", learning_rate=0.1)
    history = train(trainer, [task_file], eval_steps=5)
    harness_model: Any = HFLM
    expected = lm_eval.simple_evaluate(
        model=harness_model(pretrained=trainer.model, tokenizer=tiny_tokenizer(), batch_size=1),
        tasks=list(load_tasks([str(task_file)])["tasks"].values()),
    )
    assert expected is not None
    [row] = [row for row in history if row["step"] == 5 and f"eval_harness/{TASK}/acc" in row]
    assert row[f"eval_harness/{TASK}/acc"] == expected["results"][TASK]["acc,none"]


def test_training_is_the_same_with_and_without_it(tmp_path: Path, task_file: Path) -> None:
    generating = write_task(tmp_path / "tasks", GENERATING_YAML)
    without = make_trainer(tmp_path / "a")
    plain = train(without, [])
    state_without = (random.random(), np.random.random(), torch.rand(1).item())
    watched = make_trainer(tmp_path / "b")
    history = train(watched, [task_file, generating], eval_steps=1)
    state_with = (random.random(), np.random.random(), torch.rand(1).item())
    assert losses(history) == losses(plain)
    assert list(losses(history)) == [1, 2, 3, 4, 5]
    assert state_with == state_without
    for mine, other in zip(watched.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert "eval_harness/small_answers/exact_match/first-word" in history[0]


def test_model_and_tokenizer_are_left_as_they_were(tmp_path: Path, task_file: Path) -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    trainer = make_trainer(tmp_path / "out", model)
    callback = EvalHarnessCallback(
        trainer=trainer, tokenizer=tokenizer, tasks=[str(task_file)], eval_steps=1
    )
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    before = facts(model)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert len(evaluated_steps(trainer.state.log_history)) == 1
    assert facts(model) == before
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "right"


def facts(model: nn.Module) -> Any:
    return (
        [module.training for module in model.modules()],
        [(id(value), value.requires_grad) for value in model.parameters()],
        model.config.use_cache,  # type: ignore[union-attr]
    )


def test_a_failed_evaluation_leaves_the_model_in_training_mode(
    tmp_path: Path, task_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    trainer = make_trainer(tmp_path / "out")
    trainer.model.train()
    callback = EvalHarnessCallback(trainer, tiny_tokenizer(), [str(task_file)])
    monkeypatch.setattr(lm_eval, "evaluate", fail, raising=False)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"eval_steps": 2}, [0, 2, 4, 5]),
        ({"eval_steps": 2, "do_init_eval": False}, [2, 4, 5]),
        ({"eval_steps": 2, "eval_start": 3, "do_init_eval": False}, [3, 5]),
        ({"eval_steps": 100, "do_init_eval": False}, [5]),
    ],
)
def test_when_it_evaluates(
    tmp_path: Path, task_file: Path, options: dict[str, Any], steps: list[int]
) -> None:
    history = train(make_trainer(tmp_path / "out"), [task_file], limit=1, **options)
    assert evaluated_steps(history) == steps
    assert list(losses(history)) == [1, 2, 3, 4, 5]


def test_a_training_that_stops_early_is_evaluated_once_more(
    tmp_path: Path, task_file: Path
) -> None:
    from transformers import TrainerCallback

    class StopAtThree(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(tmp_path / "out")
    trainer.add_callback(StopAtThree())
    history = train(trainer, [task_file], eval_steps=2, limit=1)
    assert evaluated_steps(history) == [0, 2, 3]


def test_a_resumed_run_continues_the_curve(tmp_path: Path, task_file: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = train(make_trainer(tmp_path / "out", **saving), [task_file], eval_steps=2)
    resumed = train(
        make_trainer(tmp_path / "out", **saving),
        [task_file],
        eval_steps=2,
        resume=str(tmp_path / "out" / "checkpoint-3"),
    )
    assert evaluated_steps(resumed) == evaluated_steps(whole) == [0, 2, 4, 5]
    assert losses(resumed) == losses(whole)


def test_a_peft_model(tmp_path: Path, task_file: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    history = train(make_trainer(tmp_path / "out", model), [task_file], eval_steps=5, limit=2)
    assert evaluated_steps(history) == [0, 5]


def test_a_folder_of_tasks(tmp_path: Path, task_file: Path) -> None:
    write_task(tmp_path / "tasks", GENERATING_YAML)
    assert sorted(load_tasks([str(task_file.parent)])["tasks"]) == ["small_answers", TASK]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("hellaswagg", "no task 'hellaswagg'; did you mean hellaswag?"),
        ("{tmp}/absent.yaml", "absent.yaml does not exist"),
        ("{tmp}/empty", "empty holds no task file"),
        ("{tmp}/list.yaml", "list.yaml is no task file"),
        ("{tmp}/broken.yaml", "broken.yaml cannot be loaded"),
        ("{tmp}/no_data.yaml", "no_data.yaml cannot be loaded"),
    ],
)
def test_tasks_that_cannot_be_evaluated(tmp_path: Path, task: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.yaml").write_text("- task")
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "no_data.yaml").write_text(TASK_YAML.replace("items.jsonl", "absent.jsonl"))
    with pytest.raises(ConfigError) as caught:
        load_tasks([task.replace("{tmp}", str(tmp_path))])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_task_twice(task_file: Path) -> None:
    with pytest.raises(ConfigError, match="names task small_things a second time"):
        load_tasks([str(task_file), str(task_file.parent)])


@pytest.mark.parametrize(
    "wrong", [{"eval_steps": 0}, {"eval_start": -1}, {"eval_batch_size": 0}, {"limit": 0}]
)
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    trainer: Any = None
    [name] = wrong
    with pytest.raises(ConfigError, match=name):
        EvalHarnessCallback(trainer, tiny_tokenizer(), ["piqa"], **wrong)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ConfigError, match=r"pip install 'privatelora\[eval\]'"):
        load_tasks(["piqa"])
