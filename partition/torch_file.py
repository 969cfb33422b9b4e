"""Torch files (``.bin``): loaded as plain tables of tensors, in memory that their size bounds."""

from __future__ import annotations

import zipfile
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
