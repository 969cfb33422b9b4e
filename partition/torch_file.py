"""Torch files (``.bin``): loaded as plain tables of tensors, in memory that their size bounds."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from privatelora.errors import PartitionError

MAX_PICKLE_NBYTES = 2 << 20
"""Longest table of contents read from an archive: some 300 bytes a tensor. It takes 50 times that
in memory to load."""


def load_torch_file(path: Path, *, mmap: bool) -> object:
    """Return what a torch file holds; nothing in it is executed, whatever the environment says.

    ``mmap``: leave the numbers in the file. Raises PartitionError for an archive that would take
    far more memory than disk, else what ``torch.load`` raises, which can be anything.
    """
    _check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def load_state_dict(path: Path) -> Mapping[object, object]:
    """Return the table in a torch file, with the numbers left in the file where it can be mapped.

    Raises PartitionError if there is no such file, or if it is damaged or no plain table.
    """
    if not path.is_file():
        raise PartitionError(f"{path} does not exist")
    try:
        # Only files of the older, unzipped format cannot be mapped.
        state = load_torch_file(path, mmap=zipfile.is_zipfile(path))
    except PartitionError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to lead to
        reason = str(error).partition("\n")[0][:200]
        raise PartitionError(
            f"{path} is damaged, or not a plain torch state dict; nothing in it was executed "
            f"({reason})"
        ) from error
    if not isinstance(state, Mapping):
        raise PartitionError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU and no larger than the bytes behind it."""
    return (
        tensor.layout is torch.strided
        and tensor.is_cpu
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # torch does not compress, but would read what somebody else has compressed.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
                raise PartitionError(
                    f"{path} holds compressed {entry.filename!r}, which torch never writes; use a "
                    "safetensors version"
                )
            if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_NBYTES:
                raise PartitionError(
                    f"{path} has a table of contents of {entry.file_size} bytes; at most "
                    f"{MAX_PICKLE_NBYTES} are read. Use a safetensors version"
                )
