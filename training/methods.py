"""What is trained, by name: PrivateLoRA's M, LoRA on layers of choice, or every weight.

A method turns a frozen model into one with parameters that train, and writes what serves: an
adapter for cloud and edge, a PEFT folder, or a Hugging Face folder. A checkpoint of a training run
holds the same, so whatever was trained until then can be used as it is.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel as Settings
from pydantic import ConfigDict, Field, StrictInt
from torch import nn

from privatelora.errors import ConfigError
from privatelora.partition.adapter import Adapter, load_adapter, save_adapter
from privatelora.partition.basis import BasisFingerprint, FileBasis
from privatelora.partition.files import os_errors, write_atomic
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import ArrangementOptions, parse_layers, write_plan_file
from privatelora.partition.published import ADAPTER_NAME, BASIS_NAME, PLAN_NAME
from privatelora.training.adapted import AdaptedProjections
from privatelora.training.base_model import BaseModel, make_public_basis

logger = logging.getLogger(__name__)

State = Mapping[str, torch.Tensor]

PROJECTIONS = "private_lora"
"""The name under which a model holds its AdaptedProjections."""
LORA_TARGETS = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qkv": ("q_proj", "k_proj", "v_proj"),
}
PEFT_DIR = "peft"
MODEL_DIR = "model"


class PrivateLoraMethod(ArrangementOptions):
    """Train M: the private matrices of one arrangement of exchange points."""

    name: Literal["privatelora"] = "privatelora"
    basis: str = "svd"
    """Where A and B come from: ``svd``, ``random``, or a file."""
    seed: int = Field(default=0, ge=0)
    """Of a random basis."""
    train_basis: bool = False
    """Train A and B too, for study: the basis then follows from private data, is another for
    everybody, and whoever gets it learns something of that data."""


class LoraMethod(Settings):
    """Train ordinary LoRA (through PEFT), to compare with: it has no low-rank exchange."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Literal["lora"]
    targets: Literal["all", "qkv"] = "all"
    """Every linear layer of the decoder, or the q, k and v projections."""
    layers: StrictInt | str | tuple[StrictInt, ...] = "all"
    """As in a plan."""
    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class FullMethod(Settings):
    """Train every weight, to compare with: nothing of it is public any more."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Literal["full"]


MethodConfig = Annotated[PrivateLoraMethod | LoraMethod | FullMethod, Field(discriminator="name")]


class Trainable(ABC):
    """A model with parameters that train, and the ways these are kept."""

    model: nn.Module
    """Called as transformers' models are."""
    learning_rate: float
    """What usually trains it well with AdamW."""
    plan: Plan | None = None
    """How it exchanges, if it does."""
    packs: bool = False
    """Whether the model leaves out padding by itself."""

    @property
    def num_parameters(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @abstractmethod
    def save(self, directory: Path, state: State | None = None) -> dict[str, Path]:
        """Write what serves into ``directory``; return what it is called and where it lies.

        ``state``: the parameters by name, gathered from all processes where they are sharded;
        default: those of the model.
        """

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Take exactly what ``save`` wrote. Raises PartitionError or ConfigError."""


class TrainableM(Trainable):
    """M of an arrangement; A and B are frozen, unless for study."""

    learning_rate = 5e-3
    plan: Plan

    def __init__(self, base: BaseModel, method: PrivateLoraMethod) -> None:
        self.model = base.model
        self._base = base
        self._method = method
        self.plan = method.plan_for(base.config)
        basis, self._basis_fingerprint = make_public_basis(
            base.source, self.plan, method.basis, method.seed
        )
        if method.train_basis:
            logger.warning(
                "A and B are trained too: the basis is then no longer public by construction. It "
                "follows from your data, and a cloud that serves it holds a part of that"
            )
        self._projections = AdaptedProjections(
            self.plan, basis, dtype=base.model.dtype, train_basis=method.train_basis
        ).to(base.model.device)
        self._projections.attach(base.model.model)
        setattr(self.model, PROJECTIONS, self._projections)

    def save(self, directory: Path, state: State | None = None) -> dict[str, Path]:
        """Write the adapter, its plan, and the basis if it was trained."""
        own = None if state is None else _below(f"{PROJECTIONS}.", state)
        with os_errors(f"write {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
        written = {"adapter": directory / ADAPTER_NAME, "plan": directory / PLAN_NAME}
        fingerprint = self._basis_fingerprint
        if self._method.train_basis:
            basis = self._projections.basis(own)
            fingerprint = _fingerprint(basis)
            written["basis"] = directory / BASIS_NAME
            write_atomic(written["basis"], safetensors.torch.save(basis))
        write_plan_file(written["plan"], self.plan)
        weights = self._projections.weights(own)
        save_adapter(
            written["adapter"], Adapter(weights, self.plan, fingerprint, self._base.fingerprint)
        )
        return written

    def load(self, directory: Path) -> None:
        """Take an adapter of this arrangement, basis and model."""
        fingerprint = self._basis_fingerprint
        if self._method.train_basis:
            file = FileBasis(self.plan, self._base.config, directory / BASIS_NAME)
            basis = dict(file.tensors())
            fingerprint = _fingerprint(basis)
            self._projections.load_basis(basis)
        adapter = load_adapter(
            directory / ADAPTER_NAME, self.plan, fingerprint, self._base.fingerprint
        )
        self._projections.load_weights(adapter.weights)


class TrainableLora(Trainable):
    """LoRA by PEFT."""

    learning_rate = 5e-4

    def __init__(self, base: BaseModel, method: LoraMethod) -> None:
        peft = _import_peft()
        config = peft.LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=list(LORA_TARGETS[method.targets]),
            layers_to_transform=list(parse_layers(method.layers, base.config.num_layers)),
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(base.model, config)

    def save(self, directory: Path, state: State | None = None) -> dict[str, Path]:
        """Write a PEFT folder, which ``privatelora adapter from-peft`` reads."""
        model: Any = self.model
        with os_errors(f"write {directory}"):
            # It would ask the hub whether the embedding was made larger.
            model.save_pretrained(
                str(directory / PEFT_DIR), state_dict=state, save_embedding_layers=False
            )
        return {"peft": directory / PEFT_DIR}

    def load(self, directory: Path) -> None:
        """Take a PEFT folder of the same ranks and layers."""
        peft = _import_peft()
        try:
            state = peft.load_peft_weights(str(directory / PEFT_DIR), device="cpu")
            result = peft.set_peft_model_state_dict(self.model, state)
        except (OSError, ValueError, RuntimeError) as error:
            line = str(error).partition("\n")[0]
            raise ConfigError(f"{directory / PEFT_DIR} cannot be used: {line}") from error
        if result.unexpected_keys:
            raise ConfigError(
                f"{directory / PEFT_DIR} was made for other layers: {result.unexpected_keys[0]}"
            )


class TrainableWhole(Trainable):
    """Every weight."""

    learning_rate = 2e-5

    def __init__(self, base: BaseModel) -> None:
        if base.model.dtype is not torch.float32:
            raise ConfigError(
                "method full needs dtype float32: in fewer bits its small steps are rounded away "
                "(bf16: true under trainer computes in bfloat16 all the same)"
            )
        self.model = base.model.requires_grad_(True)
        self._tokenizer = base.tokenizer

    def save(self, directory: Path, state: State | None = None) -> dict[str, Path]:
        """Write a Hugging Face folder."""
        model: Any = self.model
        with os_errors(f"write {directory}"):
            model.save_pretrained(str(directory / MODEL_DIR), state_dict=state)
            self._tokenizer.save_pretrained(str(directory / MODEL_DIR))
        return {"model": directory / MODEL_DIR}

    def load(self, directory: Path) -> None:
        """Take the weights of a Hugging Face folder of the same model."""
        model: Any = self.model
        try:
            other = type(model).from_pretrained(
                str(directory / MODEL_DIR), dtype=model.dtype, local_files_only=True
            )
            model.load_state_dict(other.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            line = str(error).partition("\n")[0]
            raise ConfigError(f"{directory / MODEL_DIR} cannot be used: {line}") from error


def make_trainable(base: BaseModel, method: MethodConfig) -> Trainable:
    """Prepare ``base``, which is changed, for one method. Raises ConfigError or PartitionError."""
    match method:
        case PrivateLoraMethod():
            return TrainableM(base, method)
        case LoraMethod():
            return TrainableLora(base, method)
        case FullMethod():
            return TrainableWhole(base)


def _below(prefix: str, state: State) -> dict[str, torch.Tensor]:
    """The part of a state dict that belongs to one module."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def _fingerprint(basis: Mapping[str, torch.Tensor]) -> str:
    digest = BasisFingerprint()
    for name, tensor in basis.items():
        digest.add(name, tensor)
    return digest.hexdigest()


def _import_peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            "method lora needs peft; install it with: pip install 'privatelora[train]'"
        ) from error
