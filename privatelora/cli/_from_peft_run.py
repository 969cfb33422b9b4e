"""The work of ``privatelora adapter from-peft``: text through the model, and M from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from privatelora.cli._calibration_texts import TEXTS
from privatelora.errors import ConfigError
from privatelora.partition.adapter import Adapter
from privatelora.partition.from_peft import (
    LeftOut,
    Lost,
    changed_projections,
    left_out,
    project,
)
from privatelora.partition.from_peft_file import PeftLora, read_peft
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import PlanOptions, read_plan_file
from privatelora.plain_file import open_plain
from privatelora.runtime.calibration import (
    Basis,
    Divergence,
    ListenedModel,
    ModelSource,
    WholeModel,
    divergence,
    open_model,
    open_shards,
    public_basis,
)
from privatelora.runtime.device import compute_device

NO_TEXT = "none"
MAX_FILE_NBYTES = 1 << 20
"""Read of a file of text: more than is used."""
MAX_TEXT_TOKENS = 256
MAX_TEXTS = 32
MIN_TOKENS = 64
HELD_OUT_EVERY = 4
"""One text in four is kept back, to judge what was fitted to the others."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    peft_dir: Path
    model: str | None
    shards: Path | None
    plan: Path | None
    given: dict[str, Any]
    """Options that override those of ``plan``."""
    basis: str
    seed: int
    calibration: str | None
    device: str


@dataclass(frozen=True)
class Outputs:
    """Predictions on text kept back: how far they are from those of model and LoRA."""

    positions: int
    adapter: Divergence
    base: Divergence


@dataclass(frozen=True)
class Projected:
    """An adapter and what was lost on the way; without text ``outputs`` is None."""

    adapter: Adapter
    base_model: str | None
    """The model that the LoRA says it is for."""
    num_fitted: int
    num_held_out: int
    lost: list[Lost]
    left_out: list[LeftOut]
    outputs: Outputs | None


@dataclass(frozen=True)
class _Opened:
    source: ModelSource
    lora: PeftLora
    plan: Plan
    basis: Basis
    basis_fingerprint: str
    model_fingerprint: str


def run(request: Request, say: Callable[[str], None]) -> Projected:
    """Project the LoRA and judge the result. ``say``: told what is being done.

    Raises PartitionError or ConfigError.
    """
    device = compute_device(request.device)
    with _opened(request) as opened:
        source, lora, plan = opened.source, opened.lora, opened.plan
        fitted, kept = _texts(source, request.calibration)
        inputs = held_out = None
        if fitted:
            say("running the model on text")
            listened = ListenedModel(source, device)
            inputs, held_out = listened.inputs(fitted), listened.inputs(kept)
            del listened
        say("projecting")
        weights, lost = project(lora, plan, opened.basis, source.read, inputs, held_out)
        del inputs, held_out
        adapter = Adapter(weights, plan, opened.basis_fingerprint, opened.model_fingerprint)
        outputs = None
        if kept:
            say("comparing predictions")
            outputs = _compare(opened, adapter, kept, device)
        return Projected(
            adapter=adapter,
            base_model=lora.base_model,
            num_fitted=sum(map(len, fitted)),
            num_held_out=sum(map(len, kept)),
            lost=lost,
            left_out=left_out(lora, plan, source.read),
            outputs=outputs,
        )


@contextmanager
def _opened(request: Request) -> Iterator[_Opened]:
    if request.shards is not None:
        with open_shards(request.shards) as (source, manifest, basis):
            lora = read_peft(request.peft_dir, source.config)
            digests = (manifest.basis_fingerprint, manifest.model_fingerprint)
            yield _Opened(source, lora, manifest.plan, basis, *digests)
        return
    with open_model(str(request.model)) as (source, checkpoint):
        lora = read_peft(request.peft_dir, source.config)
        given = request.given
        if request.plan is None:
            layers, targets = changed_projections(lora, source.config)
            given = {"layers": layers, "targets": targets, **given}
            options = PlanOptions()
        else:
            options = read_plan_file(request.plan)
        plan = options.model_copy(update=given).plan_for(source.config)
        yield _Opened(
            source, lora, plan, *public_basis(checkpoint, plan, request.basis, request.seed)
        )


def _texts(source: ModelSource, calibration: str | None) -> tuple[list[list[int]], list[list[int]]]:
    """Token sequences to fit to, and those kept back; none if no text is wanted."""
    if calibration == NO_TEXT:
        return [], []
    longest = min(MAX_TEXT_TOKENS, source.config.max_positions)
    if calibration is None:
        sequences = [source.encode(text)[:longest] for text in TEXTS]
    else:
        token_ids = source.encode(_read_text(Path(calibration)))
        if len(token_ids) < MIN_TOKENS:
            raise ConfigError(
                f"{calibration} has {len(token_ids)} tokens, too few to fit to; give at least "
                f"{MIN_TOKENS}, better some thousand"
            )
        length = min(longest, len(token_ids) // (2 * HELD_OUT_EVERY))
        ends = range(length, min(len(token_ids), MAX_TEXTS * length) + 1, length)
        sequences = [token_ids[end - length : end] for end in ends]
    kept = sequences[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    fitted = [ids for i, ids in enumerate(sequences) if (i + 1) % HELD_OUT_EVERY]
    return fitted, kept


def _read_text(path: Path) -> str:
    try:
        with open_plain(path) as file:
            data = file.read(MAX_FILE_NBYTES)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if len(data) == MAX_FILE_NBYTES and error.start > len(data) - 4:
            return data[: error.start].decode()  # a character that was cut apart
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _compare(
    opened: _Opened, adapter: Adapter, texts: list[list[int]], device: torch.device
) -> Outputs:
    with_lora = WholeModel(opened.source, device, changes=opened.lora.changes)
    reference = [with_lora.log_probs(token_ids) for token_ids in texts]
    del with_lora  # one model in memory at a time
    adapted = WholeModel(opened.source, device, adapter=adapter, basis=opened.basis)
    of_adapter = divergence(adapted, texts, reference)
    del adapted
    of_base = divergence(WholeModel(opened.source, device), texts, reference)
    return Outputs(sum(map(len, texts)), of_adapter, of_base)
