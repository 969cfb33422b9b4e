"""Files: written so that a reader never meets half of one, read in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from privatelora.errors import PartitionError

SHARED_MODE = 0o644
PRIVATE_MODE = 0o600
MAX_JSON_VALUES = 1 << 18
"""Python takes up to 30 times a text's size for one of empty lists. The manifest of a decoder with
1024 layers holds some 90 000 values."""


@contextlib.contextmanager
def os_errors(action: str) -> Iterator[None]:
    """Translate OSError inside the block into PartitionError: ``cannot {action}: reason``."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if str(error.filename or "") not in action else ""
        reason = error.strerror or str(error)
        raise PartitionError(f"cannot {action}: {reason}{where}") from error


def write_atomic(path: Path, data: bytes, mode: int = SHARED_MODE) -> None:
    """Write ``data`` to ``path``, which holds either its old content or all of the new one.

    ``mode``: permission bits, less those in the umask. Raises PartitionError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os_errors(f"write {path}"):
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def check_space(directory: Path, nbytes: int, what: str) -> None:
    """Raise PartitionError if ``nbytes``, which ``what`` need, do not fit ``directory``'s disk."""
    with os_errors(f"write {directory}"):
        free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise PartitionError(
            f"{what} need {nbytes / 2**30:.1f} GiB, the disk of {directory.parent} has "
            f"{free / 2**30:.1f} GiB left; free some space or choose another directory"
        )


def parse_json(text: bytes) -> object:
    """Return what JSON of bounded size says. Raises ValueError, also for too much or too deep."""
    if text.count(b",") > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES} values")
    try:
        value: object = json.loads(text)
    except RecursionError as error:
        raise ValueError("too many lists in each other") from error
    return value


def sha256_of_file(path: Path) -> str:
    """SHA-256 (hex) of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
