"""The private matrices M: their file, and the check that they fit what they are used with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from privatelora.errors import PartitionError
from privatelora.partition.files import PRIVATE_MODE, write_atomic
from privatelora.partition.plan import Plan, Target
from privatelora.partition.tensor_file import TensorFileReader, open_tensor_file
from privatelora.yaml_file import explain

FORMAT = "privatelora-adapter"
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class Adapter:
    """M of every adapted projection, and what it was made for.

    ``weights``: float32 (rank_down, rank_up) by layer and target, on the CPU.
    ``plan``: gives the arrangement; its placement is without meaning here.
    ``model_fingerprint``: None if the adapter is not bound to one model.
    """

    weights: dict[tuple[int, Target], Tensor]
    plan: Plan
    basis_fingerprint: str
    model_fingerprint: str | None


def lora_m_name(layer: int, target: Target) -> str:
    """Name of one M in the file."""
    return f"model.layers.{layer}.self_attn.{target}_proj.lora_M.weight"


def init_adapter(
    plan: Plan,
    basis_fingerprint: str,
    model_fingerprint: str | None,
    *,
    std: float = 0.0,
    seed: int = 0,
) -> Adapter:
    """Return a fresh adapter.

    With ``std`` 0 every M is zero and the adapted model is exactly the base model; otherwise
    M is normal with that deviation, from ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {
        (layer, target): torch.empty(plan.rank_down, plan.rank_up).normal_(
            0.0, std, generator=generator
        )
        for layer in plan.layers
        for target in plan.targets
    }
    return Adapter(weights, plan, basis_fingerprint, model_fingerprint)


def save_adapter(path: Path, adapter: Adapter) -> None:
    """Write the adapter, readable by its owner alone; a file already there is replaced whole.

    Raises PartitionError if it cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "arrangement": json.dumps(adapter.plan.arrangement()),
        "basis_fingerprint": adapter.basis_fingerprint,
    }
    if adapter.model_fingerprint is not None:
        metadata["model_fingerprint"] = adapter.model_fingerprint
    tensors = {
        lora_m_name(layer, target): weight.detach().to("cpu", torch.float32).contiguous()
        for (layer, target), weight in adapter.weights.items()
    }
    write_atomic(path, safetensors.torch.save(tensors, metadata), PRIVATE_MODE)


def read_adapter(path: Path) -> Adapter:
    """Return the adapter in a file, whatever it was made for.

    Raises PartitionError if the file is not an adapter, of another format version, damaged,
    or not what it says of itself.
    """
    with open_tensor_file(path) as file:
        plan = _read_arrangement(file)
        names = {
            lora_m_name(layer, target): (layer, target)
            for layer in plan.layers
            for target in plan.targets
        }
        file.check(dict.fromkeys(names, (plan.rank_down, plan.rank_up)))
        weights = {}
        for name, key in names.items():
            if file.dtype(name) != "F32":
                raise PartitionError(f"{path}: tensor {name} is {file.dtype(name)}, expected F32")
            weights[key] = file.read(name)
            if not bool(weights[key].isfinite().all()):
                raise PartitionError(f"{path}: tensor {name} holds infinite values or NaN")
        basis_fingerprint = file.metadata.get("basis_fingerprint")
        if basis_fingerprint is None:
            raise PartitionError(f"{path} is damaged: it does not name its basis")
        return Adapter(weights, plan, basis_fingerprint, file.metadata.get("model_fingerprint"))


def load_adapter(path: Path, plan: Plan, basis_fingerprint: str, model_fingerprint: str) -> Adapter:
    """Return the adapter in a file, for use with shards of this plan, basis and model.

    Raises PartitionError if it was made for another arrangement, basis or model, or as
    :func:`read_adapter` does.
    """
    adapter = read_adapter(path)
    check_adapter(adapter, str(path), plan, basis_fingerprint, model_fingerprint)
    return adapter


def check_adapter(
    adapter: Adapter, path: str, plan: Plan, basis_fingerprint: str, model_fingerprint: str
) -> None:
    """Raise PartitionError if ``adapter``, read from ``path``, is not for these three."""
    theirs, ours = adapter.plan.arrangement(), plan.arrangement()
    different = [key for key in ours if theirs[key] != ours[key]]
    if different:
        key = different[0]
        raise PartitionError(
            f"{path} was made for another arrangement: {key} is {_short(theirs[key])} there and "
            f"{_short(ours[key])} in the shard; partition the model with the adapter's plan, or "
            "use another adapter"
        )
    if adapter.basis_fingerprint != basis_fingerprint:
        raise PartitionError(
            f"{path} was made for basis {adapter.basis_fingerprint[:12]}, here is "
            f"{basis_fingerprint[:12]}; give the adapter's own with --basis (to partition, or to "
            "generate without shards), or use another adapter"
        )
    if adapter.model_fingerprint not in (None, model_fingerprint):
        raise PartitionError(
            f"{path} was made for model {str(adapter.model_fingerprint)[:12]}, here is "
            f"{model_fingerprint[:12]}; use that model, or another adapter"
        )


def _read_arrangement(file: TensorFileReader) -> Plan:
    if file.metadata.get("format") != FORMAT:
        raise PartitionError(
            f"{file.path} is not a PrivateLoRA adapter; make one with privatelora adapter init, or "
            "import a published one with privatelora adapter import"
        )
    version = file.metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise PartitionError(
            f"{file.path} has adapter format version {version!r}, this program reads "
            f"{FORMAT_VERSION}"
        )
    try:
        return Plan.model_validate_json(file.metadata.get("arrangement", ""))
    except ValidationError as error:
        raise PartitionError(f"{file.path} is damaged: arrangement: {explain(error)}") from error


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
