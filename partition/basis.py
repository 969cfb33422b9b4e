"""The public matrices A and B: their names, shapes, fingerprint, and where they come from.

A basis is a stream of float32 tensors, one at a time, so that a split never holds it all:

    points.{index}.lora_A.weight                        (num_blocks * rank_up, hidden_size)
    model.layers.{l}.self_attn.{t}_proj.lora_B.weight   (out_features, rank_down)

Per layer, the blocks of A are stacked in the order of the plan's targets; grouped, there is
one block for the whole span.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from privatelora.errors import PartitionError
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.plan import ExchangePoint, Plan, Target, fingerprint
from privatelora.partition.tensor_file import open_tensor_file, sha256_of

BasisKind = Literal["random", "svd", "file"]


class BasisProvenance(BaseModel):
    """Where a basis came from. ``seed`` belongs to ``random`` alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: BasisKind
    seed: int | None = Field(default=None, ge=0)


class Basis(Protocol):
    """Something that makes every tensor of :func:`basis_shapes` once, in an order of its own."""

    @property
    def provenance(self) -> BasisProvenance:
        """Kind and seed, for the manifest."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and float32 tensor; PartitionError if one cannot be made."""
        ...


def lora_a_name(point: ExchangePoint) -> str:
    """Name of an exchange point's A."""
    return f"points.{point.index}.lora_A.weight"


def lora_b_name(layer: int, target: Target) -> str:
    """Name of the B of one adapted projection."""
    return f"model.layers.{layer}.self_attn.{target}_proj.lora_B.weight"


def lora_a_shape(plan: Plan, config: DecoderConfig) -> tuple[int, int]:
    """Shape of every point's A: (z_size, hidden_size)."""
    return (plan.z_size, config.hidden_size)


def lora_b_shape(plan: Plan, config: DecoderConfig, target: Target) -> tuple[int, int]:
    """Shape of every B of one target: (out_features, rank_down)."""
    return (config.projection_size(target), plan.rank_down)


def basis_shapes(plan: Plan, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every A and B of the plan, whichever side holds them."""
    shapes: dict[str, tuple[int, ...]] = {
        lora_a_name(point): lora_a_shape(plan, config) for point in plan.points
    }
    for layer in plan.layers:
        for target in plan.targets:
            shapes[lora_b_name(layer, target)] = lora_b_shape(plan, config, target)
    return shapes


class BasisFingerprint:
    """Fingerprint over the float32 bytes of all tensors, in whatever order they are added.

    It does not depend on the dtype in which shards store the basis.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[int, ...], str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one float32 tensor."""
        self._entries[name] = (tuple(tensor.shape), sha256_of(tensor.to(torch.float32)))

    def hexdigest(self) -> str:
        """SHA-256 (hex) of everything added, sorted by name."""
        return fingerprint([[name, *entry] for name, entry in sorted(self._entries.items())])


class RandomBasis:
    """Every tensor uniform in ±1/sqrt(in_features), the default of ``nn.Linear``.

    Each tensor depends on the seed and its own name alone, and is the same on every machine
    and with every version of every library: its bits are SHAKE-256 of seed and name.
    """

    def __init__(self, plan: Plan, config: DecoderConfig, seed: int) -> None:
        self.provenance = BasisProvenance(kind="random", seed=seed)
        self._shapes = basis_shapes(plan, config)
        self._seed = seed

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor."""
        for name, shape in self._shapes.items():
            yield name, uniform(self._seed, name, shape)


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return float32 numbers uniform in ±1/sqrt(shape[-1]), a function of seed and name."""
    source = hashlib.shake_256(f"privatelora basis\n{seed}\n{name}".encode())
    words = np.frombuffer(source.digest(4 * math.prod(shape)), dtype="<u4")
    # 24 random bits fill a float32 exactly, so only the last product rounds.
    unit = (words >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return torch.from_numpy(unit * np.float32(1 / math.sqrt(shape[-1]))).reshape(shape)


class FileBasis:
    """A basis read from a safetensors file with exactly the plan's tensors."""

    provenance = BasisProvenance(kind="file")

    def __init__(self, plan: Plan, config: DecoderConfig, path: Path) -> None:
        self._path = path
        self._shapes = basis_shapes(plan, config)
        with open_tensor_file(path) as file:
            file.check(self._shapes)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor."""
        with open_tensor_file(self._path) as file:
            file.check(self._shapes)
            for name in self._shapes:
                tensor = file.read(name)
                # Checked as what it becomes: float64 holds numbers that float32 does not.
                converted = tensor.to(torch.float32)
                if not tensor.is_floating_point() or not bool(converted.isfinite().all()):
                    raise PartitionError(
                        f"{self._path}: tensor {name} holds something other than finite numbers"
                    )
                yield name, converted
