"""One file of weights: safetensors, or a torch ``.bin`` read without running its pickle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from privatelora.errors import PartitionError
from privatelora.partition.models.families import Shape
from privatelora.partition.tensor_file import check_header_size
from privatelora.partition.torch_file import is_plain_tensor, load_torch_file

_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_DISALLOWED_GLOBAL = re.compile(r"GLOBAL (\S+)")


class Shard(Protocol):
    """A file that holds some of a checkpoint's tensors."""

    path: Path

    def names(self) -> frozenset[str]:
        """Names in this file."""

    def shape(self, name: str) -> Shape:
        """Shape of a tensor in this file."""

    def dtype(self, name: str) -> torch.dtype | str:
        """Dtype it is stored as: torch's, or the file's own word for one that is not a weight's."""

    def read(self, name: str) -> torch.Tensor:
        """One contiguous tensor on the CPU."""

    def close(self) -> None:
        """Release the file."""


class SafetensorsShard:
    """A ``.safetensors`` file, mapped; only its header is parsed on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any
        try:
            check_header_size(path)
            self._file = safe_open(path, framework="pt", device="cpu")
            self._names: frozenset[str] = frozenset(self._file.keys())
        except FileNotFoundError as error:
            raise PartitionError(f"{path} does not exist") from error
        except (SafetensorError, OSError) as error:
            raise PartitionError(
                f"{path} is truncated or damaged ({error}); download it again"
            ) from error

    def names(self) -> frozenset[str]:
        """Names in this file."""
        return self._names

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the header."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        """Dtype of a tensor, from the header."""
        stored = str(self._file.get_slice(name).get_dtype())
        return _SAFETENSORS_DTYPES.get(stored, stored)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as a view of the mapped file."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise PartitionError(f"{self.path}: cannot read {name} ({error})") from error
        return tensor

    def close(self) -> None:
        """Release the mapping; may be repeated."""
        self._file.__exit__(None, None, None)


class BinShard:
    """A torch ``.bin`` file, mapped, unpickled by torch's loader for plain tensors only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = _load_bin(path)
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) and is_plain_tensor(value)
            for name, value in loaded.items()
        ):
            raise PartitionError(f"{path} is not a plain table of names and tensors")
        self._tensors: dict[str, torch.Tensor] = loaded

    def names(self) -> frozenset[str]:
        """Names in this file."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | str:
        """Dtype of a tensor."""
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as a view of the mapped file where its layout allows."""
        return self._tensors[name].detach().contiguous()

    def close(self) -> None:
        """Drop the mapping."""
        self._tensors = {}


def _load_bin(path: Path) -> object:
    if not path.is_file():
        raise PartitionError(f"{path} does not exist")
    try:
        return load_torch_file(path, mmap=True)
    except PartitionError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes happen to lead to
        text = str(error)
        culprit = _DISALLOWED_GLOBAL.search(text)
        if culprit:
            raise PartitionError(
                f"{path} would run code when loaded (it names {culprit[1]}); it was not "
                "executed. Use a safetensors version of the model"
            ) from error
        if "mmap can only be used" in text:
            raise PartitionError(
                f"{path} is damaged, or in torch's format of before 1.6, which is not read "
                "(nothing in it was executed); use a safetensors version of the model"
            ) from error
        reason = text.partition("\n")[0][:200]
        raise PartitionError(
            f"{path} is truncated or damaged ({reason}); nothing in it was executed. "
            "Download it again"
        ) from error
