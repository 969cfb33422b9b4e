"""Shards appear whole or not at all, and nothing that was there is lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from privatelora.errors import ConfigError, PartitionError
from tests.partition.shards import split


def test_an_existing_shard_is_kept_unless_forced(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(tiny_llama, out)
    before = (out / "cloud" / "model.safetensors").read_bytes()
    with pytest.raises(PartitionError, match=r"cloud exists; .*--force"):
        split(tiny_llama, out, seed=1)
    assert (out / "cloud" / "model.safetensors").read_bytes() == before
    manifests = split(tiny_llama, out, seed=1, replace=True)
    assert (out / "cloud" / "model.safetensors").read_bytes() != before
    assert manifests["edge"].basis.seed == 1
    assert sorted(os.listdir(out)) == ["cloud", "edge"]


def test_replacing_never_deletes_what_is_not_a_shard(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(tiny_llama, out)
    (out / "edge" / "adapter.safetensors").write_bytes(b"private")
    with pytest.raises(PartitionError, match=r"holds 'adapter\.safetensors'.*move that away"):
        split(tiny_llama, out, replace=True)
    assert (out / "edge" / "adapter.safetensors").read_bytes() == b"private"


class StopError(Exception):
    """Raised where a test wants the work to end."""


@pytest.mark.parametrize("phase", ["model", "basis"])
@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, phase: str, error: type[BaseException]
) -> None:
    def stop(current: str, done: int, total: int) -> None:
        if current == phase and done > total // 2:
            raise error

    with pytest.raises(error):
        split(tiny_llama, tmp_path / "a" / "out", progress=stop)
    assert not (tmp_path / "a" / "out").exists()


def test_a_failed_replacement_keeps_the_old_shards(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(tiny_llama, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def stop(current: str, done: int, total: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        split(tiny_llama, out, seed=1, replace=True, progress=stop)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_directory_that_appears_meanwhile_is_not_overwritten(
    tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def appear(current: str, done: int, total: int) -> None:
        (out / "edge").mkdir(exist_ok=True)
        (out / "edge" / "notes").write_text("mine")

    with pytest.raises(PartitionError, match=r"cannot write .*not empty"):
        split(tiny_llama, out, progress=appear)
    assert os.listdir(out) == ["edge"]
    assert (out / "edge" / "notes").read_text() == "mine"


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.partition.shards import split

def die(phase, done, total):
    if phase == "basis":
        os.kill(os.getpid(), signal.SIGKILL)

split(Path(sys.argv[1]), Path(sys.argv[2]), progress=die)
"""


def test_what_a_killed_run_leaves_is_no_shard_and_is_cleaned_up(
    tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", KILLED, tiny_llama, out], capture_output=True, check=False
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    left = os.listdir(out)
    assert len(left) == 1
    assert left[0].startswith(".partial-")
    split(tiny_llama, out)
    assert sorted(os.listdir(out)) == ["cloud", "edge"]


def test_two_runs_do_not_write_into_one_directory(tiny_llama: Path, tmp_path: Path) -> None:
    tried: list[str] = []

    def meanwhile(phase: str, done: int, total: int) -> None:
        if not tried:
            tried.append(phase)
            with pytest.raises(PartitionError, match="being written by another process"):
                split(tiny_llama, tmp_path / "out")

    split(tiny_llama, tmp_path / "out", progress=meanwhile)
    assert tried
    assert sorted(os.listdir(tmp_path / "out")) == ["cloud", "edge"]


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Make the system refuse to let a file grow further, as a full disk or a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(PartitionError) as error:
        split(tiny_llama, tmp_path / "out")
    assert str(error.value).startswith("cannot write ")
    assert "File too large" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_said_before_writing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = (2**30, 2**30 - 1000, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": usage[2]}))
    with pytest.raises(PartitionError, match=r"the shards need .* GiB left"):
        split(tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(PartitionError, match=r"cannot write .*file"):
            split(tiny_llama, out)


def test_what_is_wrong_with_the_basis_is_said_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(PartitionError, match=r"rank_up 33 .* k projection"):
        split(tiny_llama, tmp_path / "out", basis="svd", rank_up=33)
    with pytest.raises(ConfigError, match="'sdv' is neither svd, random, nor a file"):
        split(tiny_llama, tmp_path / "out", basis="sdv")
    assert not (tmp_path / "out").exists()
