"""The Hugging Face Trainer with our loss, our checkpoints, and an eye on numbers that burst."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from privatelora.errors import TrainingError
from privatelora.training.data.collate import IGNORED
from privatelora.training.data.examples import Encoded
from privatelora.training.methods import Trainable

logger = logging.getLogger(__name__)


class Rows(Dataset[Encoded]):
    """Encoded examples as a dataset."""

    def __init__(self, examples: Sequence[Encoded]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Encoded:
        return self._examples[index]


class HoldBack(Protocol):
    """What keeps training near the base model: a term of the loss on rows of general text."""

    def __call__(self, logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor | None:
        """Mean divergence from the base model on the batch's replayed rows; None without any."""


class AnswerTrainer(Trainer):
    """Trains on the answers of ordinary rows, and on the base model's view of replayed ones.

    The loss of a batch is the mean cross-entropy over the labels of its ordinary rows, plus
    ``hold_back_weight`` times ``hold_back`` of the others.
    """

    def __init__(
        self,
        trainable: Trainable,
        args: TrainingArguments,
        examples: Sequence[Encoded],
        collate: Callable[[Sequence[Encoded]], dict[str, Any]],
        *,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler[int] | None = None,
        hold_back: HoldBack | None = None,
        hold_back_weight: float = 0.0,
    ) -> None:
        """Prepare a run; ``train`` starts it. ``sampler``: the order of rows, default a shuffle."""
        self._trainable = trainable
        self._sampler = sampler
        self._hold_back = hold_back
        self._hold_back_weight = hold_back_weight
        self._parts: dict[str, list[torch.Tensor]] = {}
        super().__init__(
            model=trainable.model,
            args=args,
            train_dataset=Rows(examples),
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[_FiniteGradients()],
        )
        self.loss_is_scaled_for_ga = False  # ours is a mean, as if each batch stood alone
        for printing in (PrinterCallback, ProgressCallback):  # they write to standard output
            self.remove_callback(printing)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch; TrainingError if it is not a number."""
        batches = [inputs] if return_outputs else self._batches(inputs)
        loss, divergence, outputs = torch.zeros((), device=inputs["labels"].device), None, None
        for batch in batches:
            outputs = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                logits_to_keep=batch["logits_to_keep"],
            )
            loss = loss + answer_loss(outputs.logits, batch["labels"], batch["reference"] < 0)
            if self._hold_back is not None and self._hold_back_weight:
                found = self._hold_back(outputs.logits, batch)
                divergence = divergence if found is None else found
        if divergence is not None:
            self._note("answer_loss", loss)
            self._note("kl_to_base", divergence)
            loss = loss + self._hold_back_weight * divergence
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is {float(loss.detach())}; "
                "nothing was changed by that step. Lower learning_rate, or look for extreme data"
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the Trainer logs, and the parts of its loss since the last time."""
        if "loss" in logs:
            for name, values in self._parts.items():
                logs[name] = float(torch.stack(values).mean())
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def _batches(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Ordinary and replayed rows apart, for these are longer and all would be padded to them.

        All in one where the model pads nothing anyway, and where its parameters are gathered or
        its gradients exchanged anew for every pass.
        """
        is_ordinary = inputs["reference"] < 0
        if self._trainable.packs or self.args.world_size > 1 or self.is_deepspeed_enabled:
            return [inputs]
        kinds = [rows for rows in (is_ordinary, ~is_ordinary) if bool(rows.any())]
        return [inputs] if len(kinds) == 1 else [_some_rows(inputs, rows) for rows in kinds]

    def _note(self, name: str, value: torch.Tensor) -> None:
        self._parts.setdefault(name, []).append(value.detach().float().cpu())

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Any:
        if self._sampler is not None:
            return self._sampler
        return super()._get_train_sampler(train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self._trainable.save(Path(output_dir or self.args.output_dir or "."), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._trainable.load(Path(resume_from_checkpoint))


def _some_rows(batch: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The batch of some rows, without padding that they have in common. ``rows``: (B,) bool."""
    labels, mask = batch["labels"][rows], batch["attention_mask"][rows]
    # The first column that is none but padding in no row; labels end with one that is in all.
    first_label = int((labels != IGNORED).any(dim=0).int().argmax())
    first_token = int(mask.any(dim=0).int().argmax())
    labels = labels[:, first_label:]
    return {
        "input_ids": batch["input_ids"][rows, first_token:],
        "attention_mask": mask[:, first_token:],
        "labels": labels,
        "logits_to_keep": labels.shape[1],
        "reference": batch["reference"][rows],
    }


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, is_meant: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, float32, over the labelled positions of the rows that are meant.

    ``logits``: (B, K, vocab_size); ``labels``: (B, K), the token that follows each position, or
    -100; ``is_meant``: (B,) bool. Zero without any such position.
    """
    chosen = (labels != IGNORED) & is_meant.unsqueeze(1)
    if not bool(chosen.any()):
        return logits.sum() * 0.0
    return F.cross_entropy(logits[chosen].float(), labels[chosen])


class _FiniteGradients(TrainerCallback):
    """Stops before a step that would write NaN into every weight."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                raise TrainingError(
                    f"step {state.global_step + 1}: the gradient of {name} is not finite; nothing "
                    "was changed by that step. Lower learning_rate, or look for extreme data"
                )


class ShowProgress(TrainerCallback):
    """Tells how far a run is, instead of the Trainer's own printing, which goes to stdout."""

    def __init__(self, show: Callable[[str, int, int], None]) -> None:
        """``show``: takes what is being done, the steps that are done, and those there are."""
        self._show = show
        self._losses = ""

    def on_log(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        last = state.log_history[-1]
        if "loss" in last:
            self._losses = f", loss {last['loss']:.3g}"
        if "kl_to_base" in last:
            self._losses += f", KL to the base model {last['kl_to_base']:.2g}"

    def on_step_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_local_process_zero:
            self._show(f"training{self._losses}", state.global_step, state.max_steps)


class StopGently(TrainerCallback):
    """Ends a run after the step under way, with a checkpoint, when it is asked to stop."""

    def __init__(self) -> None:
        self.was_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGINT and SIGTERM; a second one ends the program at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.was_asked:
            raise KeyboardInterrupt
        self.was_asked = True
        logger.warning("stopping after this step; once more stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer to save and to stop."""
        if self.was_asked:
            control.should_save = True
            control.should_training_stop = True


SIGNALS = (signal.SIGINT, signal.SIGTERM)
