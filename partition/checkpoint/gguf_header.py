"""The header of a GGUF file: metadata and where each tensor lies.

Parsed here rather than by ``gguf.GGUFReader`` for two reasons: a length in a damaged or
hostile file is compared with the file's size before it is followed, and a vocabulary of a
hundred thousand strings is stepped over instead of becoming as many arrays.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from privatelora.errors import PartitionError
from privatelora.plain_file import open_plain

MAX_STRING_NBYTES = 16 * 2**20
"""Longest metadata string taken, and all of them and all names together; chat templates, the
longest in practice, have kilobytes."""

MAX_ENTRIES = 32_768
"""Keys, and tensors; a decoder of 1024 layers has some 17 000 tensors."""

MAX_STEPS = 4 * 2**20
"""Strings in arrays that are stepped over; the largest vocabularies have a quarter of a million,
and as many merges."""

MAX_DIMS = 4
"""What ggml itself allows."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]

Scalar = int | float | bool | str


@dataclass(frozen=True)
class GgufArray:
    """A metadata array that was stepped over; only its length is kept."""

    length: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape in torch's order, encoding, and place in the file in bytes."""

    name: str
    shape: tuple[int, ...]
    encoding: GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key and tensors by name, as the file names them."""

    metadata: dict[str, Scalar | GgufArray]
    tensors: dict[str, GgufTensor]


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading; PartitionError if it is missing, empty or unreadable."""
    try:
        with open_plain(path) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise PartitionError(f"{path} does not exist") from error
    except ValueError as error:
        raise PartitionError(f"{path} is empty; download it again") from error
    except OSError as error:
        raise PartitionError(f"{path} cannot be read ({error.strerror})") from error


def read_header(path: Path, source: str) -> GgufHeader:
    """Parse the header of the file at ``path``; see ``parse_header``."""
    with map_file(path) as data:
        return parse_header(data, source)


def parse_header(data: mmap.mmap | bytes, source: str) -> GgufHeader:
    """Parse the header of a whole GGUF file.

    Every tensor returned lies inside ``data``. Raises PartitionError, naming ``source``, for
    anything damaged, truncated or unknown.
    """
    try:
        return _parse(_Cursor(data))
    except _BadHeaderError as error:
        raise PartitionError(f"{source}: {error}") from error


class _BadHeaderError(Exception):
    """What is wrong, without the file's name."""


class _Cursor:
    """Reads forward through ``data`` and never past its end."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self.position = 0
        self._num_text_bytes = 0
        self._num_steps = 0

    def advance(self, nbytes: int) -> int:
        """Step over ``nbytes`` and return where they start."""
        start = self.position
        if nbytes > len(self.data) - start:
            raise _BadHeaderError(
                f"truncated or damaged at byte {start} of {len(self.data)}; download it again"
            )
        self.position = start + nbytes
        return start

    def scalar(self, kind: struct.Struct) -> int | float | bool:
        value: int | float | bool = kind.unpack_from(self.data, self.advance(kind.size))[0]
        return value

    def integer(self, kind: struct.Struct) -> int:
        return int(self.scalar(kind))

    def string(self) -> str:
        nbytes = self.integer(_U64)
        self._num_text_bytes += nbytes
        if self._num_text_bytes > MAX_STRING_NBYTES:
            raise _BadHeaderError(
                f"damaged: a string of {nbytes} bytes at byte {self.position}; download it again"
            )
        start = self.advance(nbytes)
        try:
            return self.data[start : start + nbytes].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _BadHeaderError(f"damaged: no UTF-8 text at byte {start}") from error

    def value(self) -> Scalar | GgufArray:
        kind = self.integer(_U32)
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        return self.scalar(self._scalar_kind(kind))

    def _array(self) -> GgufArray:
        kind, length = self.integer(_U32), self.integer(_U64)
        if kind == _STRING:
            self._num_steps += length
            if self._num_steps > MAX_STEPS:
                raise _BadHeaderError(
                    f"damaged: an array of {length} strings at byte {self.position}; download it "
                    "again"
                )
            for _ in range(length):
                self.advance(self.integer(_U64))
        else:
            self.advance(length * self._scalar_kind(kind).size)
        return GgufArray(length)

    def _scalar_kind(self, kind: int) -> struct.Struct:
        if kind not in _SCALARS:
            raise _BadHeaderError(f"metadata of unknown type {kind} at byte {self.position}")
        return _SCALARS[kind]


def _parse(cursor: _Cursor) -> GgufHeader:
    if cursor.data[:4] != _MAGIC:
        raise _BadHeaderError("not a GGUF file (its first four bytes are not GGUF)")
    cursor.advance(4)
    version = cursor.integer(_U32)
    if version not in _VERSIONS:
        reason = "big-endian files are" if version % 2**16 == 0 else f"GGUF version {version} is"
        raise _BadHeaderError(f"{reason} not supported; versions 2 and 3, little-endian, are")
    num_tensors, num_keys = cursor.integer(_U64), cursor.integer(_U64)
    if max(num_tensors, num_keys) > MAX_ENTRIES:
        raise _BadHeaderError(
            f"damaged: {num_tensors} tensors and {num_keys} keys; at most {MAX_ENTRIES} make sense"
        )
    metadata: dict[str, Scalar | GgufArray] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise _BadHeaderError(f"damaged: metadata key {key} occurs twice")
        metadata[key] = cursor.value()
    entries: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in entries:
            raise _BadHeaderError(f"damaged: tensor {name} occurs twice")
        entries[name] = _tensor_entry(cursor, name)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _BadHeaderError(f"general.alignment is {alignment!r}")
    data_start = math.ceil(cursor.position / alignment) * alignment
    tensors = {
        name: _placed(name, shape, encoding, data_start + offset, len(cursor.data))
        for name, (shape, encoding, offset) in entries.items()
    }
    _check_apart(tensors)
    return GgufHeader(metadata, tensors)


def _check_apart(tensors: Mapping[str, GgufTensor]) -> None:
    """A small file whose tensors all lie in one place would become large shards."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise _BadHeaderError(f"damaged: {tensor.name} overlaps another tensor")
        end = tensor.start + tensor.nbytes


def _tensor_entry(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
    """Shape in torch's order, encoding, and offset from the start of the data."""
    num_dims = cursor.integer(_U32)
    if not 1 <= num_dims <= MAX_DIMS:
        raise _BadHeaderError(f"damaged: {name} has {num_dims} dimensions")
    # ggml lists dimensions fastest first.
    shape = tuple(reversed([cursor.integer(_U64) for _ in range(num_dims)]))
    if min(shape) < 1:
        raise _BadHeaderError(f"damaged: {name} has shape {list(shape)}")
    encoding = cursor.integer(_U32)
    try:
        return shape, GGMLQuantizationType(encoding), cursor.integer(_U64)
    except ValueError as error:
        raise _BadHeaderError(
            f"{name} has unknown encoding {encoding}; a newer gguf package may know it"
        ) from error


def _placed(
    name: str, shape: tuple[int, ...], encoding: GGMLQuantizationType, start: int, end: int
) -> GgufTensor:
    block_size, block_nbytes = GGML_QUANT_SIZES[encoding]
    if shape[-1] % block_size:
        raise _BadHeaderError(f"damaged: rows of {name} are no whole number of its blocks")
    nbytes = math.prod(shape) // block_size * block_nbytes
    if start + nbytes > end:
        raise _BadHeaderError(
            f"truncated: {name} ends at byte {start + nbytes} of {end}; download it again"
        )
    return GgufTensor(name, shape, encoding, start, nbytes)
