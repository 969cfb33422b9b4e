"""Safetensors files: written in any order in bounded memory, read only after a check."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from privatelora.errors import PartitionError
from privatelora.partition.files import os_errors
from privatelora.plain_file import open_plain

DtypeName = Literal["float32", "float16", "bfloat16"]

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
MAX_HEADER_NBYTES = 8 << 20
"""Longest safetensors header read; that of a decoder with 1024 layers has some 3 MB. The library
takes 100 MB, which become many times that in memory."""
CHUNK_NUMEL = 1 << 20
"""Numbers converted, hashed and written at a time."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy where it is contiguous."""
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 (hex) of the tensor's little-endian bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


class TensorFileWriter:
    """Writes a safetensors file whose names and shapes are known before any data.

    The header goes first; tensors may follow in any order. Tensors whose size is a multiple
    of 64 bytes come first in the file and so start at multiples of 64, the others behind
    them. Beyond the tensor handed in, at most one chunk of 1 Mi numbers is held.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.dtype = dtype
        self.digests: dict[str, str] = {}
        """SHA-256 (hex) of the stored bytes of every tensor written so far."""
        self.shapes = dict(shapes)
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        offset = 0
        for name in sorted(sizes, key=lambda name: (sizes[name] % ALIGNMENT != 0, name)):
            self._offsets[name] = offset
            header[name] = {
                "dtype": CODES[dtype],
                "shape": list(shapes[name]),
                "data_offsets": [offset, offset + sizes[name]],
            }
            offset += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self._start = len(text) + 8
        self.nbytes = self._start + offset
        """Size of the finished file."""
        with os_errors(f"write {path}"):
            self._file = path.open("wb", buffering=0)
            try:
                self._pwrite(len(text).to_bytes(8, "little") + text, 0)
            except BaseException:
                self._file.close()
                raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Convert the tensor to the file's dtype and store it.

        Raises PartitionError if it has another shape than announced, if a value does not
        fit the file's dtype, or if the file cannot be written.
        """
        if tuple(tensor.shape) != self.shapes[name]:
            raise PartitionError(
                f"tensor {name} has shape {tuple(tensor.shape)}, expected {self.shapes[name]}"
            )
        digest = hashlib.sha256()
        offset = self._start + self._offsets[name]
        with os_errors(f"write {self.path}"):
            for chunk in torch.split(tensor.detach().reshape(-1), CHUNK_NUMEL):
                data = tensor_bytes(self._converted(name, chunk))
                digest.update(data)
                self._pwrite(data, offset)
                offset += data.nbytes
        self.digests[name] = digest.hexdigest()

    def _converted(self, name: str, chunk: Tensor) -> Tensor:
        if chunk.dtype == self.dtype:
            return chunk
        converted = chunk.to(self.dtype)
        if self.dtype == torch.float16 and not torch.equal(converted.isinf(), chunk.isinf()):
            raise PartitionError(
                f"tensor {name} has values beyond the range of float16; choose bfloat16 or float32"
            )
        return converted

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._file.fileno(), left, offset)
            left = left[written:]
            offset += written

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with os_errors(f"write {self.path}"), self._file:
            if kind is None:
                os.fsync(self._file.fileno())
        missing = sorted(self.shapes.keys() - self.digests.keys())
        if kind is None and missing:
            raise PartitionError(f"{self.path}: no data for tensor {missing[0]}")


class TensorFileReader:
    """An open safetensors file: shapes and dtypes at once, data tensor by tensor."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self.metadata: dict[str, str] = handle.metadata() or {}
        self.names: frozenset[str] = frozenset(handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as the safetensors header spells it (``F32``, ``BF16``, ...)."""
        code: str = self._handle.get_slice(name).get_dtype()
        return code

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise PartitionError unless the file holds exactly these names and shapes."""
        for name in sorted(shapes.keys() - self.names):
            raise PartitionError(f"{self.path}: tensor {name} is missing")
        for name in sorted(self.names - shapes.keys()):
            raise PartitionError(f"{self.path}: tensor {name} is not expected here")
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise PartitionError(
                    f"{self.path}: tensor {name} has shape {self.shape(name)}, expected {shape}"
                )

    def read(self, name: str) -> Tensor:
        """Return a copy of the tensor that does not depend on the file any more."""
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor.clone()


def check_header_size(path: Path) -> None:
    """Raise SafetensorError, as the library does for its own limits, for too long a header.

    Raises OSError if this is no plain file that can be read.
    """
    with open_plain(path) as file:
        nbytes = int.from_bytes(file.read(8), "little")
    if nbytes > MAX_HEADER_NBYTES:
        raise SafetensorError(f"a header of {nbytes} bytes; at most {MAX_HEADER_NBYTES} are read")


@contextlib.contextmanager
def open_tensor_file(path: Path) -> Iterator[TensorFileReader]:
    """Open a safetensors file.

    Raises PartitionError if it does not exist or if header and size do not fit together,
    also for what goes wrong while it is open.
    """
    with os_errors(f"read {path}"):
        try:
            # First, because the library's error for a missing file is vague.
            check_header_size(path)
            with safe_open(path, framework="pt") as handle:
                yield TensorFileReader(path, handle)
        except SafetensorError as error:
            raise PartitionError(
                f"{path} is damaged, cut short, or not a safetensors file ({error})"
            ) from error
