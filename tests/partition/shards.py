"""Helpers of the tests around shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.layout import ShardRole
from privatelora.partition.manifest import Manifest
from privatelora.partition.plan_file import make_plan
from privatelora.partition.split import Progress, make_basis, partition_checkpoint


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output as JSON."""
        return json.loads(self.out)


Command = Callable[..., Result]


def split(
    model: Path,
    out: Path,
    *,
    basis: str = "random",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
    rank: int = 8,
    progress: Progress = lambda phase, done, total: None,
    **options: Any,
) -> dict[ShardRole, Manifest]:
    """Partition a checkpoint directory with small ranks."""
    with open_checkpoint(str(model)) as checkpoint:
        plan = make_plan(checkpoint.config, **{"rank_up": rank, "rank_down": rank, **options})
        return partition_checkpoint(
            checkpoint,
            out,
            plan,
            make_basis(basis, plan, checkpoint, seed=seed),
            dtype=dtype,
            replace=replace,
            progress=progress,
        )
