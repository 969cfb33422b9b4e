"""Importing the adapter file of the published PrivateLoRA system (arXiv 2311.14030).

It is a torch state dict that carries M together with A and B, for each adapted projection:

    model.layers.{l}.self_attn.{t}_lora.lora_A.weight        (rank_up, hidden_size)
    model.layers.{l}.self_attn.{t}_lora.lora_mobile.weight   (rank_down, rank_up), this is M
    model.layers.{l}.self_attn.{t}_lora.lora_B.weight        (out_features, rank_down)

Here these become a basis file, a plan and an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from privatelora.errors import PartitionError
from privatelora.partition.adapter import Adapter, save_adapter
from privatelora.partition.basis import BasisFingerprint, lora_a_name, lora_b_name
from privatelora.partition.files import os_errors, write_atomic
from privatelora.partition.models.families import MAX_LAYERS
from privatelora.partition.plan import TARGETS, Plan, Target
from privatelora.partition.plan_file import write_plan_file
from privatelora.partition.torch_file import is_plain_tensor, load_state_dict
from privatelora.yaml_file import explain

BASIS_NAME = "basis.safetensors"
PLAN_NAME = "plan.yaml"
ADAPTER_NAME = "adapter.safetensors"

_PARTS = ("lora_A", "lora_mobile", "lora_B")
_NAME = re.compile(
    r"(?:.*\.)?model\.layers\.(\d{1,4})\.self_attn\.([qkv])_lora\."
    r"(lora_A|lora_mobile|lora_B)\.weight"
)

Key = tuple[int, Target]


@dataclass(frozen=True)
class PublishedAdapter:
    """What a published file holds, in this project's terms. ``basis``: float32, by name."""

    plan: Plan
    basis: dict[str, Tensor]
    adapter: Adapter


def read_published(
    path: Path, *, num_layers: int | None = None, scaling: float = 1.0
) -> PublishedAdapter:
    """Return the content of a published adapter file.

    ``num_layers``: of the model; by default up to the highest layer in the file. ``scaling``:
    what the adapter was trained with. Raises PartitionError if the file is not such a state
    dict, or if parts are missing or do not fit each other.
    """
    parts = _find_parts(load_state_dict(path), path)
    layers = tuple(sorted({layer for layer, _ in parts}))
    targets = tuple(target for target in TARGETS if (layers[0], target) in parts)
    first = parts[layers[0], targets[0]]
    if num_layers is not None and layers[-1] >= num_layers:
        raise PartitionError(
            f"{path} adapts layer {layers[-1]}, a model of {num_layers} layers ends with layer "
            f"{num_layers - 1}; correct --num-layers"
        )
    try:
        plan = Plan(
            num_layers=num_layers or layers[-1] + 1,
            layers=layers,
            targets=targets,
            rank_up=first["lora_mobile"].shape[1],
            rank_down=first["lora_mobile"].shape[0],
            scaling=scaling,
        )
    except ValidationError as error:
        raise PartitionError(f"{path} cannot be imported: {explain(error)}") from error
    _check_parts(parts, plan, first["lora_A"].shape[1], path)
    basis: dict[str, Tensor] = {}
    for point in plan.points:
        basis[lora_a_name(point)] = torch.cat(
            [parts[point.layer, target]["lora_A"] for target in targets]
        )
    for (layer, target), part in parts.items():
        basis[lora_b_name(layer, target)] = part["lora_B"]
    digest = BasisFingerprint()
    for name, tensor in basis.items():
        digest.add(name, tensor)
    weights = {key: part["lora_mobile"] for key, part in parts.items()}
    return PublishedAdapter(plan, basis, Adapter(weights, plan, digest.hexdigest(), None))


def write_published(out: Path, published: PublishedAdapter) -> None:
    """Write basis.safetensors, plan.yaml and adapter.safetensors into ``out``.

    Raises PartitionError if one exists already or cannot be written.
    """
    with os_errors(f"write {out}"):
        out.mkdir(parents=True, exist_ok=True)
        for name in (BASIS_NAME, PLAN_NAME, ADAPTER_NAME):
            if (out / name).exists():
                raise PartitionError(f"{out / name} exists; choose another directory")
    write_atomic(out / BASIS_NAME, safetensors.torch.save(published.basis))
    write_plan_file(out / PLAN_NAME, published.plan)
    save_adapter(out / ADAPTER_NAME, published.adapter)


def _find_parts(state: Mapping[object, object], path: Path) -> dict[Key, dict[str, Tensor]]:
    """Return the three matrices of every adapted projection, float32, by layer and target."""
    parts: dict[Key, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            if isinstance(name, str) and "lora" in name:
                raise PartitionError(
                    f"{path} holds {name}, which is not part of the published layout; only q, k "
                    "and v can be adapted"
                )
            continue  # a frozen weight, which the checkpoint has too
        layer, part = int(match[1]), match[3]
        target = next(target for target in TARGETS if target == match[2])
        if layer >= MAX_LAYERS:
            raise PartitionError(f"{path}: {name} names a layer beyond {MAX_LAYERS - 1}")
        if not (
            isinstance(value, Tensor)
            and value.ndim == 2
            and value.is_floating_point()
            and is_plain_tensor(value)
        ):
            raise PartitionError(f"{path}: {name} is not a matrix of numbers")
        found = parts.setdefault((layer, target), {})
        if part in found:
            raise PartitionError(f"{path} holds {name} twice, under different prefixes")
        # Copied, so that nothing refers to the mapped file any more.
        found[part] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        if not bool(found[part].isfinite().all()):
            raise PartitionError(f"{path}: {name} holds infinite values or NaN")
    if not parts:
        raise PartitionError(
            f"{path} holds no published PrivateLoRA adapter: no tensor is named like "
            "model.layers.0.self_attn.q_lora.lora_A.weight"
        )
    for (layer, target), found in parts.items():
        for part in _PARTS:
            if part not in found:
                raise PartitionError(
                    f"{path}: layer {layer} has no {part} for {target}; the file is incomplete"
                )
    return parts


def _check_parts(
    parts: Mapping[Key, Mapping[str, Tensor]], plan: Plan, hidden_size: int, path: Path
) -> None:
    """Raise unless every adapted layer has the same targets, ranks and sizes."""
    expected = {(layer, target) for layer in plan.layers for target in plan.targets}
    odd = sorted(expected ^ parts.keys())
    if odd:
        raise PartitionError(
            f"{path}: layer {odd[0][0]} and layer {plan.layers[0]} adapt different projections; "
            "all layers must adapt the same ones"
        )
    for (layer, target), part in parts.items():
        out_features = parts[plan.layers[0], target]["lora_B"].shape[0]
        shapes = {
            "lora_A": (plan.rank_up, hidden_size),
            "lora_mobile": (plan.rank_down, plan.rank_up),
            "lora_B": (out_features, plan.rank_down),
        }
        for name, shape in shapes.items():
            if tuple(part[name].shape) != shape:
                raise PartitionError(
                    f"{path}: {name} of layer {layer} {target} has shape "
                    f"{tuple(part[name].shape)}, expected {shape}; all ranks and sizes must agree"
                )
