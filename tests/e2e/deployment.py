"""Small deployments for tests: a partitioned model, its adapter, and both sides of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from privatelora.benchmarks.baseline import attach_adapter
from privatelora.partition.adapter import Adapter, init_adapter, save_adapter
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


def split_checkpoint(
    model: str, directory: Path, *, basis: str = "random", std: float = 0.1, **plan_options: Any
) -> Deployment:
    """Partition ``model`` in float32 and write an adapter for it."""
    with open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint.config, **plan_options)
        made = make_basis(basis, plan, checkpoint)
        partition_checkpoint(checkpoint, directory, plan, made, dtype=torch.float32)
        tensors = dict(make_basis(basis, plan, checkpoint).tensors())
    manifest = open_shard(directory / "edge", "edge").manifest
    adapter = init_adapter(
        plan, manifest.fingerprints.basis, manifest.fingerprints.model, std=std, seed=1
    )
    deployment = Deployment(directory, plan, tensors, adapter)
    save_adapter(deployment.adapter_file, adapter)
    return deployment


def tiny_deployment(family: str, directory: Path, **plan_options: Any) -> tuple[Deployment, Any]:
    """A tiny model of ``family`` split, and the transformers model with the same adapter."""
    save_tiny(family, directory / "model")
    deployment = split_checkpoint(str(directory / "model"), directory / "shards", **plan_options)
    reference = attach_adapter(
        tiny_model(family), deployment.plan, deployment.basis, deployment.adapter.weights
    )
    return deployment, reference
