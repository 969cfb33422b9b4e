"""Splitting a model for a benchmark, with an adapter that changes what it says."""

from __future__ import annotations

from pathlib import Path

import torch

from privatelora.partition.adapter import init_adapter, save_adapter
from privatelora.partition.checkpoint import Checkpoint
from privatelora.partition.manifest import Manifest
from privatelora.partition.plan import Plan
from privatelora.partition.split import make_basis, partition_checkpoint

ADAPTER_STD = 0.02
"""Of the random M: large enough to change the logits, as a trained one would."""


def split_with_adapter(
    checkpoint: Checkpoint, plan: Plan, shards: Path, adapter_file: Path, dtype: torch.dtype
) -> Manifest:
    """Write both shards, on a random basis, and an adapter; the edge's manifest.

    Raises PartitionError.
    """
    manifest = partition_checkpoint(
        checkpoint,
        shards,
        plan,
        make_basis("random", plan, checkpoint),
        dtype=dtype,
        replace=True,
    )["edge"]
    prints = manifest.fingerprints
    adapter = init_adapter(plan, prints.basis, prints.model, std=ADAPTER_STD)
    save_adapter(adapter_file, adapter)
    return manifest
