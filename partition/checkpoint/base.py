"""What every checkpoint reader offers, and the check of its tensors against its configuration."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from privatelora.errors import PartitionError
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import Shape, tensor_names

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What a weight may be read as."""

_SHOWN_NAMES = 3

# Old checkpoints carry this buffer, which follows from the configuration.
_DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class TokenizerSource:
    """Where the tokenizer is: Hugging Face files in ``directory``, or inside its ``gguf_file``."""

    directory: Path
    gguf_file: str | None = None


class Checkpoint(ABC):
    """A model on disk, read one tensor at a time under Hugging Face names.

    Opening one checks every name and shape against the configuration, so ``read`` of a name
    in ``names()`` gives exactly what ``tensor_names(config)`` says. Use as a context manager.
    """

    config: DecoderConfig
    source: str
    """The file, directory or package it comes from, for messages."""
    tokenizer_source: TokenizerSource
    quantised: bool = False
    """Whether some weights are stored in fewer bits than ``read`` gives them."""

    def names(self) -> Iterable[str]:
        """Names of the model's tensors, in the order the model applies them."""
        return tuple(tensor_names(self.config))

    @abstractmethod
    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it. PartitionError if there is none of that name."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype that ``read`` returns: one of ``STORED_DTYPES``."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, contiguous and on the CPU; nothing else is loaded.

        It may be backed by the mapped file, so it must not be written to. Raises
        PartitionError for an unknown name or a damaged file.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the files. May be repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def is_derived(name: str) -> bool:
    """Whether a stored tensor only repeats what the configuration already says."""
    return _DERIVED.search(name) is not None


def check_tensors(config: DecoderConfig, stored: Mapping[str, Shape], source: str) -> None:
    """Raise PartitionError unless ``stored`` is exactly what ``config`` calls for."""
    expected = tensor_names(config)
    missing = [name for name in expected if name not in stored]
    if missing:
        raise PartitionError(
            f"{source} lacks {_some(missing)}: the checkpoint is incomplete, or its "
            "configuration belongs to another model"
        )
    unknown = [name for name in stored if name not in expected]
    if unknown:
        raise PartitionError(
            f"{source} holds {_some(unknown)}, which a {config.family} decoder of this "
            "configuration does not have"
        )
    for name, shape in expected.items():
        if stored[name] != shape:
            raise PartitionError(
                f"{source}: {name} has shape {list(stored[name])}, the configuration calls for "
                f"{list(shape)}"
            )


def _some(names: list[str]) -> str:
    """Name the first few and count the rest."""
    shown = ", ".join(names[:_SHOWN_NAMES])
    rest = len(names) - _SHOWN_NAMES
    return f"{shown} and {rest} more tensors" if rest > 0 else shown
