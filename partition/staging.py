"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from privatelora.errors import PartitionError
from privatelora.partition.files import os_errors

PREFIX = ".partial-"


@contextlib.contextmanager
def staged(
    out: Path, names: Sequence[str], *, replace: bool, content: Collection[str]
) -> Iterator[Path]:
    """Give a temporary directory in ``out``; its children ``names`` move to ``out`` at the end.

    The temporary is removed however the block ends, and so are those that killed runs left.
    Only one process at a time may stage into the same ``out``. Raises PartitionError if
    ``out`` cannot be written, or if a name exists already, unless ``replace`` is true and the
    existing directory holds nothing but entries named in ``content``.
    """
    with os_errors(f"write {out}"):
        created = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(out):
            with os_errors(f"write {out}"):
                for name in names:
                    _check_free(out / name, replace, content)
                for stale in out.glob(f"{PREFIX}*"):
                    shutil.rmtree(stale)
                temporary = out / f"{PREFIX}{secrets.token_hex(4)}"
                temporary.mkdir()
            try:
                yield temporary
                with os_errors(f"write {out}"):
                    _move_all(temporary, out, names, replace)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        if created:
            with contextlib.suppress(OSError):
                out.rmdir()  # only succeeds when nothing was made


def _check_free(path: Path, replace: bool, content: Collection[str]) -> None:
    if not path.exists():
        return
    if not replace:
        raise PartitionError(
            f"{path} exists; choose another directory, or give --force to replace it"
        )
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in content)
    if others:
        raise PartitionError(
            f"{path} holds {others[0]!r}, which replacing it would delete; move that away first"
        )


def _move_all(temporary: Path, out: Path, names: Sequence[str], replace: bool) -> None:
    """Move the new directories in, or leave everything as it was."""
    replaced = temporary / "replaced"
    replaced.mkdir()
    moved: list[str] = []
    try:
        for name in names:
            if replace and (out / name).exists():
                (out / name).rename(replaced / name)
            (temporary / name).rename(out / name)
            moved.append(name)
        _sync(out)
    except BaseException:
        for name in moved:
            (out / name).rename(temporary / name)
        for path in replaced.iterdir():
            path.rename(out / path.name)
        raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory against other stagings; the lock ends with the process."""
    with os_errors(f"write {directory}"):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PartitionError(
                f"{directory} is being written by another process; wait for it, or choose "
                "another directory"
            ) from error
        yield
    finally:
        os.close(handle)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
