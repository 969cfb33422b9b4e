"""Reading a LoRA that the PEFT library has written, as changes of a model's parameters.

``adapter_config.json`` says how the numbers in ``adapter_model.safetensors`` are meant; names
there are those of the model's modules behind ``base_model.model.``. A module's LoRA changes its
weight W by ``(alpha / r) B A`` (``alpha / sqrt(r)`` for rank-stabilised LoRA), and DoRA besides
gives every row of the sum the length ``m``: ``m (W + s B A) / |W + s B A|``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import Tensor

from privatelora.errors import PartitionError
from privatelora.partition.files import os_errors, parse_json
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import LM_HEAD, tensor_names
from privatelora.partition.tensor_file import open_tensor_file
from privatelora.partition.torch_file import is_plain_tensor, load_state_dict
from privatelora.plain_file import open_plain
from privatelora.yaml_file import explain

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
TORCH_NAME = "adapter_model.bin"
MAX_CONFIG_NBYTES = 1 << 20
MAX_PATTERN_CHARS = 200
MAX_PATTERN_REPEATS = 3
"""Patterns of ranks are regular expressions, of which some take exponential time."""

_PREFIX = "base_model.model."
_LORA_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.weight)?"
)
_UNCHANGED_START = ("gaussian", "eva", "orthogonal")
"""Ways to initialise that leave the model's own weights alone."""

# Settings that make a LoRA compute something else than a change of the model's parameters.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)

Read = Callable[[str], Tensor]
"""Returns a parameter of the model by its Hugging Face name; ``lm_head.weight`` also where it is
tied to the embedding."""


class _Config(BaseModel):
    """The settings that the numbers depend on."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str
    r: int = Field(default=8, gt=0)
    lora_alpha: FiniteFloat = 8.0
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, FiniteFloat] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    base_model_name_or_path: str | None = None

    def scaling(self, module: str, rank: int) -> float:
        """Factor on B A of a module."""
        alpha: float = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class LowRankChange:
    """What a LoRA adds to one parameter (out, in): ``left @ right``.

    ``left``: float32 (out, r), scaled already; ``right``: (r, in). ``magnitude``: with DoRA, the
    length (out,) of every row of the sum.
    """

    parameter: str
    left: Tensor
    right: Tensor
    magnitude: Tensor | None = None

    def delta(self, read: Read) -> Tensor:
        """The change, float32 (out, in)."""
        product = self.left @ self.right
        if self.magnitude is None:
            return product
        weight = read(self.parameter).float()
        changed = weight + product
        lengths: Tensor = torch.linalg.vector_norm(changed, dim=1)
        factor = torch.where(lengths > 0, self.magnitude / lengths, 0.0)
        return changed * factor.unsqueeze(1) - weight

    def energy(self, read: Read) -> float:
        """Square of the change's Frobenius norm."""
        if self.magnitude is not None:
            return float(self.delta(read).double().square().sum())
        left, right = self.left.double(), self.right.double()
        # |B A|^2 = tr(B^T B A A^T), which needs no matrix of the parameter's size.
        return float(((left.T @ left) * (right @ right.T)).sum())


@dataclass(frozen=True)
class SavedChange:
    """A parameter that is stored whole, as it is after training: float32 ``value``."""

    parameter: str
    value: Tensor

    def delta(self, read: Read) -> Tensor:
        """The change, float32, of the parameter's shape."""
        return self.value - read(self.parameter).float()

    def energy(self, read: Read) -> float:
        """Square of the change's norm."""
        return float(self.delta(read).double().square().sum())


Change = LowRankChange | SavedChange


@dataclass(frozen=True)
class PeftLora:
    """A LoRA as changes by the parameter they change, and the model it says it is for."""

    changes: dict[str, Change]
    base_model: str | None


def read_peft(directory: Path, config: DecoderConfig) -> PeftLora:
    """Return the LoRA in a folder that PEFT's ``save_pretrained`` wrote, for a model.

    Raises PartitionError if there is none, it is of another kind than LoRA, damaged, or made for
    a model of other layers or sizes.
    """
    settings = _read_config(directory / CONFIG_NAME)
    shapes = {LM_HEAD: (config.vocab_size, config.hidden_size), **tensor_names(config)}
    changes: dict[str, Change] = {}
    with _open_tensors(directory) as (path, names, read):
        for parameter, parts in _by_parameter(path, names).items():
            if parameter not in shapes:
                raise PartitionError(
                    f"{path} changes {parameter}, which this model does not have; give the model "
                    f"it was trained on{_hint(settings)}"
                )
            tensors = {part: _finite(path, name, read(name)) for part, name in parts.items()}
            change, shape = _change(path, settings, parameter, tensors)
            if shape != shapes[parameter]:
                raise PartitionError(
                    f"{path}: {parameter} has shape {shape} there and {shapes[parameter]} in this "
                    f"model; give the model it was trained on{_hint(settings)}"
                )
            changes[parameter] = change
        if not any("lora_" in name for name in names):
            raise PartitionError(f"{path} holds no LoRA: no tensor is named like ...lora_A.weight")
    return PeftLora(changes, settings.base_model_name_or_path)


def _read_config(path: Path) -> _Config:
    if not path.is_file():
        raise PartitionError(
            f"{path.parent} is not a PEFT adapter: it has no {CONFIG_NAME}; give the folder that "
            "save_pretrained wrote"
        )
    with os_errors(f"read {path}"), open_plain(path) as file:
        text = file.read(MAX_CONFIG_NBYTES + 1)
    if len(text) > MAX_CONFIG_NBYTES:
        raise PartitionError(f"{path} is larger than {MAX_CONFIG_NBYTES} bytes: no configuration")
    try:
        values = parse_json(text)
    except ValueError as error:
        raise PartitionError(f"{path} is damaged: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise PartitionError(f"{path} is damaged: it holds no object")
    kind = values.get("peft_type")
    if kind != "LORA":
        raise PartitionError(f"{path}: peft_type is {kind!r}; only LORA can be projected")
    for name in _REFUSED:
        if values.get(name):
            raise PartitionError(
                f"{path}: {name} is set, which is more than a change of the model's weights; train "
                "a LoRA without it"
            )
    try:
        config = _Config.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise PartitionError(f"{path} is damaged: {explain(error)}") from error
    start = config.init_lora_weights
    if isinstance(start, str) and start not in _UNCHANGED_START:
        raise PartitionError(
            f"{path}: init_lora_weights {start!r} has changed the model's own weights too; save "
            "it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        _check_pattern(path, pattern)
    return config


def _check_pattern(path: Path, pattern: str) -> None:
    repeats = sum(pattern.count(character) for character in "*+?{")
    if "(" in pattern or repeats > MAX_PATTERN_REPEATS or len(pattern) > MAX_PATTERN_CHARS:
        raise PartitionError(
            f"{path}: the pattern {pattern[:MAX_PATTERN_CHARS]!r} is too complicated to be read "
            "safely; name the modules one by one"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise PartitionError(f"{path}: the pattern {pattern!r} is damaged ({error})") from error


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT looks it up."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


@contextmanager
def _open_tensors(
    directory: Path,
) -> Iterator[tuple[Path, Collection[str], Callable[[str], Tensor]]]:
    """Give the file of tensors, the names in it, and how to read one."""
    path = directory / TENSORS_NAME
    if path.exists():
        with open_tensor_file(path) as file:
            yield path, file.names, file.read
        return
    path = directory / TORCH_NAME
    if not path.exists():
        raise PartitionError(f"{directory} holds no {TENSORS_NAME}; copy the whole folder")
    state = {name: value for name, value in load_state_dict(path).items() if isinstance(name, str)}

    def read(name: str) -> Tensor:
        value = state[name]
        if not isinstance(value, Tensor) or not is_plain_tensor(value):
            raise PartitionError(f"{path}: {name} is not a tensor of numbers")
        return value.detach().clone()

    yield path, state.keys(), read


def _by_parameter(path: Path, names: Collection[str]) -> dict[str, dict[str, str]]:
    """Names in the file by the parameter they change, and by part; one saved whole is its ""."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        inner = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        match = _LORA_PART.fullmatch(inner)
        if match is None and "lora_" in inner:
            raise PartitionError(f"{path} holds {name}, which is no part of a plain LoRA")
        parameter, part = (f"{match['module']}.weight", match["part"]) if match else (inner, "")
        if part in found.setdefault(parameter, {}):
            raise PartitionError(f"{path} holds {name} twice, under different names")
        found[parameter][part] = name
    return found


def _change(
    path: Path, settings: _Config, parameter: str, parts: Mapping[str, Tensor]
) -> tuple[Change, tuple[int, ...]]:
    """The change of one parameter, and the shape of what it changes."""
    value = parts.get("")
    if value is not None and len(parts) == 1:
        return SavedChange(parameter, value), tuple(value.shape)
    change = _low_rank(path, settings, parameter.removesuffix(".weight"), parts)
    shape = (change.left.shape[0], change.right.shape[1])
    if change.magnitude is not None and tuple(change.magnitude.shape) != shape[:1]:
        raise PartitionError(f"{path}: the magnitude of DoRA does not fit {parameter}")
    if value is None:
        return change, shape
    # Beside the LoRA of an embedding, PEFT saves the embedding itself.
    if tuple(value.shape) != shape or change.magnitude is not None:
        raise PartitionError(f"{path}: what it holds of {parameter} does not fit together")
    return SavedChange(parameter, value + change.left @ change.right), shape


def _low_rank(
    path: Path, settings: _Config, module: str, parts: Mapping[str, Tensor]
) -> LowRankChange:
    embedding = "lora_embedding_A" in parts
    kind = "lora_embedding_" if embedding else "lora_"
    lora_a, lora_b = parts.get(f"{kind}A"), parts.get(f"{kind}B")
    if lora_a is None or lora_b is None:
        missing = f"{kind}A" if lora_a is None else f"{kind}B"
        raise PartitionError(f"{path}: {module} has no {missing}; the file is incomplete")
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise PartitionError(
            f"{path}: {kind}A {tuple(lora_a.shape)} and {kind}B {tuple(lora_b.shape)} of {module} "
            "do not fit each other"
        )
    rank = lora_a.shape[0]
    stated = _by_pattern(settings.rank_pattern, module, settings.r)
    if rank != stated:
        raise PartitionError(
            f"{path}: {module} has rank {rank}, {CONFIG_NAME} says {stated}; they do not belong "
            "together"
        )
    magnitude = parts.get("lora_magnitude_vector")
    if settings.use_dora != (magnitude is not None):
        raise PartitionError(
            f"{path}: {module} has {'no' if magnitude is None else 'a'} magnitude of DoRA, "
            f"against {CONFIG_NAME}; they do not belong together"
        )
    if embedding and magnitude is not None:
        raise PartitionError(f"{path}: DoRA of an embedding ({module}) is not supported")
    scaling = settings.scaling(module, rank)
    if not math.isfinite(scaling * float(lora_a.norm() * lora_b.norm())):
        raise PartitionError(f"{path}: the product of {module}'s matrices is beyond float32")
    if embedding:
        return LowRankChange(f"{module}.weight", scaling * lora_a.T, lora_b.T)
    return LowRankChange(f"{module}.weight", scaling * lora_b, lora_a, magnitude)


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor in float32; PartitionError if that is not numbers."""
    if not tensor.is_floating_point():
        raise PartitionError(f"{path}: {name} is {tensor.dtype}, not floating-point numbers")
    converted = tensor.to(torch.float32)
    if not bool(converted.isfinite().all()):
        raise PartitionError(f"{path}: {name} holds infinite values or NaN")
    return converted


def _hint(settings: _Config) -> str:
    name = settings.base_model_name_or_path
    return f" ({name[:200]})" if name else ""
