"""Fixtures of the partition room's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer

from privatelora.cli import adapter, partition
from privatelora.cli._app import run
from tests.partition.shards import Command, Result
from tests.partition.tiny import save_tiny


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
