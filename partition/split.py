"""Writing the two shards of a model, one tensor at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from privatelora.errors import ConfigError
from privatelora.partition.basis import (
    Basis,
    BasisFingerprint,
    FileBasis,
    RandomBasis,
    basis_shapes,
)
from privatelora.partition.basis_svd import SvdBasis
from privatelora.partition.checkpoint import Checkpoint
from privatelora.partition.files import check_space, os_errors, sha256_of_file
from privatelora.partition.layout import ROLES, ShardRole, shard_shapes
from privatelora.partition.manifest import (
    MANIFEST_NAME,
    TENSORS_NAME,
    TOKENIZER_DIR,
    Manifest,
    TensorEntry,
    write_manifest,
)
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import tensor_names
from privatelora.partition.plan import Plan, fingerprint
from privatelora.partition.staging import staged
from privatelora.partition.tensor_file import (
    DTYPE_NAMES,
    TensorFileWriter,
    sha256_of,
)
from privatelora.partition.tokenizer import export_tokenizer

Progress = Callable[[str, int, int], None]
"""Called with what is being written (``model`` or ``basis``), bytes done and bytes in all."""


def _silent(phase: str, done: int, total: int) -> None:
    pass


Writers = dict[ShardRole, TensorFileWriter]


class ModelFingerprint:
    """Fingerprint over a model's config and every source tensor, in any order."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        self._entries: list[tuple[str, tuple[int, ...], str, str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor as the checkpoint returns it."""
        dtype = DTYPE_NAMES[tensor.dtype]
        self._entries.append((name, tuple(tensor.shape), dtype, sha256_of(tensor)))

    def hexdigest(self) -> str:
        """SHA-256 (hex) of the config and everything added, sorted by name."""
        config = self._config.model_dump(mode="json")
        return fingerprint({"config": config, "tensors": sorted(self._entries)})


def natural_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype most of the checkpoint is in; float16 if it is quantised."""
    if checkpoint.quantised:
        return torch.float16
    numel: Counter[torch.dtype] = Counter()
    for name, shape in tensor_names(checkpoint.config).items():
        numel[checkpoint.dtype(name)] += math.prod(shape)
    return numel.most_common(1)[0][0]


def make_basis(source: str, plan: Plan, checkpoint: Checkpoint, *, seed: int = 0) -> Basis:
    """Return the basis ``svd``, ``random``, or the one in the file that ``source`` names."""
    if source == "svd":
        return SvdBasis(plan, checkpoint.config, checkpoint.read)
    if source == "random":
        return RandomBasis(plan, checkpoint.config, seed)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"basis {source!r} is neither svd, random, nor a file")
    return FileBasis(plan, checkpoint.config, path)


def partition_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    plan: Plan,
    basis: Basis,
    *,
    dtype: torch.dtype,
    replace: bool = False,
    progress: Progress = _silent,
) -> dict[ShardRole, Manifest]:
    """Write ``out/cloud`` and ``out/edge``; return their manifests.

    Both appear when they are complete, or neither does. Memory: one source tensor as the
    checkpoint returns it and 32 MiB, or what making the basis needs (see basis_svd). Pages of
    a checkpoint that is mapped into memory are not counted: the system takes them back.
    ``dtype``: of every tensor in the shards. ``replace``: existing shards are replaced.
    Raises PartitionError.
    """
    plan.check_model(checkpoint.config)
    with staged(
        out, ROLES, replace=replace, content=(MANIFEST_NAME, TENSORS_NAME, TOKENIZER_DIR)
    ) as temporary:
        return _write_shards(checkpoint, temporary, plan, basis, dtype, progress)


def _write_shards(
    checkpoint: Checkpoint,
    directory: Path,
    plan: Plan,
    basis: Basis,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[ShardRole, Manifest]:
    config = checkpoint.config
    with ExitStack() as stack:
        writers: Writers = {}
        for role in ROLES:
            with os_errors(f"write {directory}"):
                (directory / role).mkdir()
            shapes = shard_shapes(config, plan, role)
            writers[role] = stack.enter_context(
                TensorFileWriter(directory / role / TENSORS_NAME, shapes, dtype)
            )
        nbytes = sum(writer.nbytes for writer in writers.values())
        check_space(directory, nbytes, "the shards")
        model = _copy_model(checkpoint, writers, progress)
        basis_fingerprint = _write_basis(basis, basis_shapes(plan, config), writers, progress)
    manifests: dict[ShardRole, Manifest] = {}
    for role, writer in writers.items():
        files = _write_tokenizer(checkpoint, directory / role) if role == "edge" else {}
        manifests[role] = Manifest(
            role=role,
            config=config,
            model_fingerprint=model,
            plan=plan,
            plan_fingerprint=plan.fingerprint,
            basis=basis.provenance,
            basis_fingerprint=basis_fingerprint,
            dtype=DTYPE_NAMES[dtype],
            tensors={
                name: TensorEntry(
                    shape=shape, dtype=DTYPE_NAMES[dtype], sha256=writer.digests[name]
                )
                for name, shape in writer.shapes.items()
            },
            files=files,
        )
        write_manifest(directory / role, manifests[role])
    return manifests


def _copy_model(checkpoint: Checkpoint, writers: Writers, progress: Progress) -> str:
    """Write every frozen tensor to the sides that hold it; return the model's fingerprint."""
    shapes = tensor_names(checkpoint.config)
    total = sum(
        math.prod(shape) * checkpoint.dtype(name).itemsize for name, shape in shapes.items()
    )
    done = 0
    model = ModelFingerprint(checkpoint.config)
    for name in shapes:
        tensor = checkpoint.read(name)
        model.add(name, tensor)
        _write(name, tensor, writers)
        done += tensor.nbytes
        progress("model", done, total)
    return model.hexdigest()


def _write_basis(
    basis: Basis, shapes: Mapping[str, tuple[int, ...]], writers: Writers, progress: Progress
) -> str:
    """Write every A and B to the side that holds it; return the basis' fingerprint."""
    total = sum(4 * math.prod(shape) for shape in shapes.values())
    done = 0
    digest = BasisFingerprint()
    for name, tensor in basis.tensors():
        digest.add(name, tensor)
        _write(name, tensor, writers)
        done += tensor.nbytes
        progress("basis", done, total)
    return digest.hexdigest()


def _write(name: str, tensor: Tensor, writers: Writers) -> None:
    for writer in writers.values():
        if name in writer.shapes:
            writer.write(name, tensor)


def _write_tokenizer(checkpoint: Checkpoint, edge: Path) -> dict[str, str]:
    """Put the tokenizer's files into the edge shard; return their hashes by relative path."""
    folder = edge / TOKENIZER_DIR
    with os_errors(f"write {folder}"):
        folder.mkdir()
        export_tokenizer(checkpoint, folder)
        return {
            f"{TOKENIZER_DIR}/{path.name}": sha256_of_file(path)
            for path in sorted(folder.iterdir())
        }
