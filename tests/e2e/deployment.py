"""Small deployments for tests: a partitioned model, its adapter, and both sides of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from privatelora.benchmarks.baseline import attach_adapter
from privatelora.partition.adapter import Adapter, init_adapter, save_adapter
from privatelora.partition.basis import Basis, BasisProvenance
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import make_plan
from privatelora.partition.shard import open_shard
from privatelora.partition.split import make_basis, partition_checkpoint
from tests.partition.tiny import save_tiny, tiny_model


@dataclass
class Deployment:
    """A model split under ``directory``, with a random adapter that is not zero."""

    directory: Path
    plan: Plan
    basis: dict[str, torch.Tensor]
    adapter: Adapter

    @property
    def cloud_shard(self) -> Path:
        return self.directory / "cloud"

    @property
    def edge_shard(self) -> Path:
        return self.directory / "edge"

    @property
    def adapter_file(self) -> Path:
        return self.directory / "adapter.safetensors"

    def cloud_yaml(self, name: str = "cloud.yaml", **settings: Any) -> Path:
        """Write settings of its cloud, on a port of the system's choice unless told."""
        return write_yaml(
            self.directory / name,
            {"listen": "tcp://127.0.0.1:0", "shard": "cloud", "num_threads": 1, **settings},
        )

    def edge_yaml(self, address: str, name: str = "edge.yaml", **settings: Any) -> Path:
        """Write settings of an edge with the adapter; exact on the wire unless told."""
        usual = {
            "cloud": address,
            "shard": "edge",
            "adapter": "adapter.safetensors",
            "num_threads": 1,
            "payload": "fp32",
        }
        return write_yaml(self.directory / name, {**usual, **settings})


def write_yaml(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write settings that are not None."""
    kept = {k: v for k, v in settings.items() if v is not None}
    path.write_text(yaml.dump(kept, Dumper=_PlainDumper))
    return path


class _PlainDumper(yaml.SafeDumper):
    """Writes what occurs twice twice: aliases are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _KeptBasis:
    """A basis whose tensors are kept as they are made: making them again takes its time."""

    def __init__(self, basis: Basis) -> None:
        self.provenance: BasisProvenance = basis.provenance
        self.kept: dict[str, torch.Tensor] = {}
        self._basis = basis

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._basis.tensors():
            self.kept[name] = tensor.clone()
            yield name, tensor


def split_checkpoint(
    model: str, directory: Path, *, basis: str = "random", std: float = 0.1, **plan_options: Any
) -> Deployment:
    """Partition ``model`` in float32 and write an adapter for it."""
    with open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint.config, **plan_options)
        made = _KeptBasis(make_basis(basis, plan, checkpoint))
        partition_checkpoint(checkpoint, directory, plan, made, dtype=torch.float32)
    manifest = open_shard(directory / "edge", "edge").manifest
    adapter = init_adapter(
        plan, manifest.fingerprints.basis, manifest.fingerprints.model, std=std, seed=1
    )
    deployment = Deployment(directory, plan, made.kept, adapter)
    save_adapter(deployment.adapter_file, adapter)
    return deployment


def tiny_deployment(
    family: str,
    directory: Path,
    *,
    model_options: Mapping[str, Any] = MappingProxyType({}),
    **plan_options: Any,
) -> tuple[Deployment, Any]:
    """A tiny model of ``family`` split, and the transformers model with the same adapter."""
    save_tiny(family, directory / "model", **model_options)
    deployment = split_checkpoint(str(directory / "model"), directory / "shards", **plan_options)
    reference = attach_adapter(
        tiny_model(family, **model_options),
        deployment.plan,
        deployment.basis,
        deployment.adapter.weights,
    )
    return deployment, reference
