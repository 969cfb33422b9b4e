"""Opening a shard: what is wrong with it is found before any of it is used."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from privatelora.errors import CapacityError, PartitionError
from privatelora.partition.files import os_errors, sha256_of_file
from privatelora.partition.layout import ShardRole, shard_shapes
from privatelora.partition.manifest import (
    TENSORS_NAME,
    TOKENIZER_DIR,
    Manifest,
    read_manifest,
)
from privatelora.partition.tensor_file import CODES, DTYPES, open_tensor_file, sha256_of

_AGAIN = "copy the shard again, or partition the model again"


@dataclass(frozen=True)
class Shard:
    """A shard whose names, shapes, sizes and tokenizer files have been checked."""

    directory: Path
    manifest: Manifest

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer files (edge only)."""
        return self.directory / TOKENIZER_DIR

    def load(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return every tensor by name, on ``device``, in ``dtype`` or as stored.

        Each is hashed on the way; besides the result one tensor is held at a time. Raises
        PartitionError if one is damaged, CapacityError if they do not fit on the device.
        """
        path = self.directory / TENSORS_NAME
        tensors: dict[str, Tensor] = {}
        with open_tensor_file(path) as file:
            file.check(shard_shapes(self.manifest.config, self.manifest.plan, self.manifest.role))
            for name, entry in self.manifest.tensors.items():
                tensor = file.read(name)
                if sha256_of(tensor) != entry.sha256:
                    raise PartitionError(f"{path}: tensor {name} is damaged; {_AGAIN}")
                try:
                    tensors[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
                except torch.OutOfMemoryError as error:
                    raise CapacityError(
                        f"the shard {self.directory} does not fit in the memory of {device}"
                    ) from error
        return tensors


def open_shard(directory: Path, role: ShardRole) -> Shard:
    """Return the shard in ``directory`` after checking everything but the tensors' bytes.

    Raises PartitionError if it is no shard, the other side's, of another format version,
    incomplete, cut short, or if a tokenizer file is not what the manifest says.
    """
    manifest = read_manifest(directory)
    if manifest.role != role:
        raise PartitionError(
            f"{directory} is the {manifest.role} shard; the {role} needs the {role} shard"
        )
    _check_tensors(directory, manifest)
    _check_listed(directory, manifest)
    for path, digest in manifest.files.items():
        _check_file(directory / path, digest)
    return Shard(directory, manifest)


def _check_tensors(directory: Path, manifest: Manifest) -> None:
    shapes = shard_shapes(manifest.config, manifest.plan, manifest.role)
    listed = {name: entry.shape for name, entry in manifest.tensors.items()}
    different = sorted(
        name for name in shapes.keys() | listed.keys() if shapes.get(name) != listed.get(name)
    )
    if different:
        raise PartitionError(
            f"{directory}: the manifest's tensors do not fit its model and plan "
            f"({different[0]}); {_AGAIN}"
        )
    with open_tensor_file(directory / TENSORS_NAME) as file:
        file.check(shapes)
        for name, entry in manifest.tensors.items():
            if file.dtype(name) != CODES[DTYPES[entry.dtype]]:
                raise PartitionError(
                    f"{file.path}: tensor {name} is {file.dtype(name)}, the manifest says "
                    f"{entry.dtype}; {_AGAIN}"
                )


def _check_listed(directory: Path, manifest: Manifest) -> None:
    """A file that nobody lists is not hashed, but a tokenizer would read it."""
    folder = directory / TOKENIZER_DIR
    with os_errors(f"read {folder}"):
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in found:
        if f"{TOKENIZER_DIR}/{name}" not in manifest.files:
            raise PartitionError(
                f"{folder / name} is not in the manifest; remove it if you know it, else {_AGAIN}"
            )


def _check_file(path: Path, digest: str) -> None:
    with os_errors(f"read {path}"):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise PartitionError(f"{path} is not a plain file; {_AGAIN}")
        found = sha256_of_file(path)
    if found != digest:
        raise PartitionError(f"{path} is damaged or was changed; {_AGAIN}")
