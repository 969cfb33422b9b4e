"""One training run from its settings to what it leaves: read, hold back, train, measure, write."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from privatelora.errors import ConfigError, PrivateLoRAError, TrainingError
from privatelora.partition.files import PRIVATE_MODE, os_errors, write_atomic
from privatelora.partition.tokenizer import load_tokenizer
from privatelora.runtime.config import load_edge_config
from privatelora.runtime.device import compute_device
from privatelora.training.base_model import load_base_model
from privatelora.training.config import TrainConfig
from privatelora.training.data.collate import collate
from privatelora.training.data.config import DataConfig
from privatelora.training.data.encode import encode_all
from privatelora.training.data.examples import Encoded, Example
from privatelora.training.data.scoring import score_generated
from privatelora.training.data.sources import read_sources
from privatelora.training.general import GeneralReferences, prepare_retention
from privatelora.training.methods import Trainable, make_trainable
from privatelora.training.mixing import MixedSampler
from privatelora.training.retention import RetentionConfig, kl_to_reference, measure_retention
from privatelora.training.trainer import AnswerTrainer, HoldBack, ShowProgress, StopGently

logger = logging.getLogger(__name__)

RESULTS_NAME = "results.json"
CHECKPOINTS_DIR = "checkpoints"
LOGS_DIR = "tensorboard"
TENSORBOARD_DIR = "TENSORBOARD_LOGGING_DIR"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train, still exactly the base model."""

    trainable: Trainable
    tokenizer: PreTrainedTokenizerBase
    model_fingerprint: str
    max_positions: int


@dataclass(frozen=True)
class Outcome:
    """What a run left. ``results``: as in its file."""

    results: dict[str, Any]
    written: dict[str, Path]


def run_training(
    config: TrainConfig, *, resume: bool = False, progress: Progress = lambda *_: None
) -> Outcome:
    """Train as ``config`` says and write adapter, checkpoints, logs and results below its ``out``.

    ``resume``: go on from the last checkpoint there; without it a folder with checkpoints is
    refused. Raises ConfigError, PartitionError, or TrainingError for a run that cannot go on: its
    message says where that lies which was trained until then.
    """
    checkpoint = _last_checkpoint(config.out, resume)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    prepared = _prepare(config)
    data = config.data
    encode = partial(
        encode_all,
        tokenizer=prepared.tokenizer,
        settings=data,
        max_positions=prepared.max_positions,
    )
    examples = read_sources(data.train)
    rows = encode(examples)
    held_out = {name: read_sources(sources) for name, sources in data.evaluate.items()}
    _warn_of_known(examples, held_out)
    with os_errors(f"write {config.out}"):
        (config.out / CHECKPOINTS_DIR).mkdir(parents=True, exist_ok=True)
    general = None
    if config.retention is not None:
        general = prepare_retention(
            prepared.trainable.model,
            prepared.tokenizer,
            config.retention,
            model_fingerprint=prepared.model_fingerprint,
            max_positions=prepared.max_positions,
            cache=config.out,
            progress=progress,
        )
    with _logs_in(config.out / LOGS_DIR):
        trainer = make_trainer(
            prepared,
            rows,
            general=general,
            retention=config.retention,
            arguments=_arguments(config, prepared.trainable),
            loss_on=data.loss_on,
        )
    measure = partial(_measure, prepared, held_out, general, data, progress)
    before = measure("before")
    _add_harness(trainer, config, prepared)
    trainer.add_callback(ShowProgress(progress))
    stopped = _train(trainer, checkpoint, config.out)
    written = prepared.trainable.save(config.out)
    results = {
        "steps": trainer.state.global_step,
        "stopped_early": stopped,
        "trainable_parameters": prepared.trainable.num_parameters,
        "before": before,
        "after": measure("after"),
        "log": trainer.state.log_history,
    }
    # Answers to private questions are private too.
    write_atomic(config.out / RESULTS_NAME, json.dumps(results, indent=2).encode(), PRIVATE_MODE)
    return Outcome(results, written)


def _warn_of_known(examples: Sequence[Example], held_out: Mapping[str, Sequence[Example]]) -> None:
    """Say so if questions that measure what was learnt are trained on."""
    trained = {example.prompt for example in examples}
    for name, questions in held_out.items():
        if known := sum(example.prompt in trained for example in questions):
            logger.warning(
                "%d of the %d questions of evaluate: %s are trained on word for word; its score "
                "says less about others",
                known,
                len(questions),
                name,
            )


def make_trainer(
    prepared: Prepared,
    rows: Sequence[Encoded],
    *,
    general: GeneralReferences | None,
    retention: RetentionConfig | None,
    arguments: dict[str, Any],
    loss_on: Literal["answer", "all"] = "answer",
) -> AnswerTrainer:
    """Return a trainer of ``rows``, and of replayed ones if there are any.

    ``arguments``: the Trainer's, by name. Raises ConfigError for those it refuses.
    """
    args = _training_arguments(arguments)
    hold_back: HoldBack | None = None
    sampler: Sampler[int] | None = None
    weight = 0.0
    if general is not None and retention is not None and general.replay is not None:
        replay = general.replay
        sampler = MixedSampler(
            len(rows),
            len(replay.examples),
            batch_size=args.per_device_train_batch_size,
            share=retention.replay_share,
            seed=args.seed,
        )
        rows = [*rows, *replay.examples]
        weight = retention.kl_weight

        def hold_back(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor | None:
            return kl_to_reference(logits, batch, replay)

    return AnswerTrainer(
        prepared.trainable,
        args,
        rows,
        partial(collate, pad_token_id=prepared.tokenizer.pad_token_id, loss_on=loss_on),
        tokenizer=prepared.tokenizer,
        sampler=sampler,
        hold_back=hold_back,
        hold_back_weight=weight,
    )


def _prepare(config: TrainConfig) -> Prepared:
    if config.edge is not None:
        return _prepare_split(config.edge, config.device)
    base = load_base_model(
        str(config.model), getattr(torch, config.dtype), compute_device(config.device)
    )
    return Prepared(
        make_trainable(base, config.method),
        base.tokenizer,
        base.fingerprint,
        base.config.max_positions,
    )


def _prepare_split(edge: Path, device: str) -> Prepared:
    from privatelora.training.split.open import open_split_model
    from privatelora.training.split.trainable import TrainableSplit

    model = open_split_model(load_edge_config(edge), device)
    tokenizer = load_tokenizer(model.tokenizer_dir)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Prepared(TrainableSplit(model), tokenizer, model.fingerprints.model, model.max_positions)


def _arguments(config: TrainConfig, trainable: Trainable) -> dict[str, Any]:
    return {
        "learning_rate": trainable.learning_rate,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": ["tensorboard"] if _has_tensorboard() else [],
        "dataloader_pin_memory": config.device != "cpu",
        **config.trainer,
        "output_dir": str(config.out / CHECKPOINTS_DIR),
        "seed": config.seed,
        "use_cpu": config.device == "cpu",
    }


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def _training_arguments(arguments: dict[str, Any]) -> TrainingArguments:
    """The Trainer's arguments; what it refuses is a ConfigError."""
    try:
        return TrainingArguments(**{**arguments, "remove_unused_columns": False})
    except (TypeError, ValueError, ImportError, OSError) as error:
        line = str(error).strip().partition("\n")[0]
        raise ConfigError(f"trainer: {line}") from error


def _last_checkpoint(out: Path, resume: bool) -> str | None:
    folder = out / CHECKPOINTS_DIR
    # The state comes last: a checkpoint without it was cut off while it was written.
    whole = [
        state.parent
        for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        if state.parent.name.rpartition("-")[2].isdecimal()
    ]
    found = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if resume and found is None:
        raise ConfigError(f"{folder} holds no checkpoint to go on from; leave out --resume")
    if found is not None and not resume:
        raise ConfigError(
            f"{folder} holds checkpoints of another run; add --resume to go on from the last, or "
            "choose another out"
        )
    return None if found is None else str(found)


def _add_harness(trainer: AnswerTrainer, config: TrainConfig, prepared: Prepared) -> None:
    if config.harness is None:
        return
    from privatelora.training.eval import EvalHarnessCallback

    trainer.add_callback(
        EvalHarnessCallback(
            trainer=trainer, tokenizer=prepared.tokenizer, **config.harness.model_dump()
        )
    )


def _train(trainer: AnswerTrainer, checkpoint: str | None, out: Path) -> bool:
    """Train to the end, or until somebody asks to stop; return whether that was so."""
    stop = StopGently()
    trainer.add_callback(stop)
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=checkpoint)
    except (PrivateLoRAError, torch.OutOfMemoryError) as error:
        steps = trainer.state.global_step
        kept = "nothing was trained yet"
        if steps:
            trainer.save_model(str(out))
            kept = f"what {steps} steps have trained is in {out}"
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"{reason} ({kept})") from error
    return stop.was_asked


def _measure(
    prepared: Prepared,
    held_out: Mapping[str, Sequence[Example]],
    general: GeneralReferences | None,
    settings: DataConfig,
    progress: Progress,
    when: str,
) -> dict[str, Any]:
    """Accuracy on every set that was held out, and what is left of the base model."""
    model, tokenizer = prepared.trainable.model, prepared.tokenizer
    measured: dict[str, Any] = {}
    for name, examples in held_out.items():
        score = score_generated(
            model,
            tokenizer,
            examples,
            settings=settings,
            max_new_tokens=settings.max_answer_tokens,
            progress=partial(progress, f"{name}, {when}"),
        )
        measured[name] = score.details()
    if general is not None:
        measured["retention"] = asdict(measure_retention(model, general.held_out))
    return measured


@contextlib.contextmanager
def _logs_in(directory: Path) -> Iterator[None]:
    """Let TensorBoard's files go there: the Trainer takes that from the environment alone."""
    before = os.environ.get(TENSORBOARD_DIR)
    os.environ[TENSORBOARD_DIR] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ[TENSORBOARD_DIR]
        else:
            os.environ[TENSORBOARD_DIR] = before
