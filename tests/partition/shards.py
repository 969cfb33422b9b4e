"""Helpers of the tests around shards: split a tiny model, and run a command as a user would."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer

from privatelora.cli import adapter, partition
from privatelora.cli._app import run
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.layout import ShardRole
from privatelora.partition.manifest import Manifest
from privatelora.partition.plan_file import make_plan
from privatelora.partition.split import make_basis, partition_checkpoint
from tests.partition.tiny import save_tiny


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


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``privatelora`` with arguments, with the commands of this room registered."""
    app = typer.Typer(add_completion=False)
    partition.register(app)
    adapter.register(app)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["privatelora", *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            run(app)
        captured = capsys.readouterr()
        return Result(int(exit_info.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint in float32; nobody writes to it."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def split(
    model: Path,
    out: Path,
    *,
    basis: str = "random",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
    rank: int = 8,
    **options: Any,
) -> dict[ShardRole, Manifest]:
    """Partition a checkpoint directory."""
    with open_checkpoint(str(model)) as checkpoint:
        plan = make_plan(checkpoint.config, **{"rank_up": rank, "rank_down": rank, **options})
        return partition_checkpoint(
            checkpoint,
            out,
            plan,
            make_basis(basis, plan, checkpoint, seed=seed),
            dtype=dtype,
            replace=replace,
        )
