"""A Hugging Face model directory: config.json and safetensors or ``.bin`` weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint.base import (
    STORED_DTYPES,
    Checkpoint,
    TokenizerSource,
    check_tensors,
    is_derived,
)
from privatelora.partition.checkpoint.shards import BinShard, SafetensorsShard, Shard
from privatelora.partition.files import parse_json
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import EMBED_TOKENS, LM_HEAD, Shape, from_hf_config
from privatelora.plain_file import open_plain

MAX_JSON_NBYTES = 4 * 2**20
"""Of config.json and the index of weights, which names each tensor: 2 MB for 1024 layers."""

_PLAIN_NAME = re.compile(r"(?!\.)[\w.+ -]{1,200}", re.ASCII)

_WEIGHT_FILES: tuple[tuple[str, Callable[[Path], Shard]], ...] = (
    ("model.safetensors", SafetensorsShard),
    ("pytorch_model.bin", BinShard),
)


class HfCheckpoint(Checkpoint):
    """Reads a Hugging Face directory. Raises PartitionError if it is damaged or unsupported."""

    def __init__(self, directory: Path, source: str | None = None) -> None:
        """Open every weight file's header and check all names, shapes and dtypes.

        ``source`` names the checkpoint in messages where the directory would mean little.
        """
        self.source = str(directory) if source is None else source
        self.tokenizer_source = TokenizerSource(directory)
        self.config = _read_config(directory)
        self._shards: list[Shard] = []
        try:
            self._where = self._open_shards(directory)
            self._drop_tied_head()
            check_tensors(
                self.config, {name: self.shape(name) for name in self._where}, self.source
            )
            for name in self._where:
                self.dtype(name)
        except BaseException:
            self.close()
            raise

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it."""
        return self._shard(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype a tensor is stored as and read as."""
        shard = self._shard(name)
        dtype = shard.dtype(name)
        if not isinstance(dtype, torch.dtype) or dtype not in STORED_DTYPES:
            raise PartitionError(
                f"{shard.path}: {name} is stored as {dtype}; only float32, float16 and bfloat16 "
                "are supported"
            )
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor, backed by the mapped file."""
        return self._shard(name).read(name)

    def close(self) -> None:
        """Release every file."""
        for shard in self._shards:
            shard.close()
        self._shards = []
        self._where = {}

    def _shard(self, name: str) -> Shard:
        try:
            return self._where[name]
        except KeyError:
            state = "is closed" if not self._shards else f"holds no tensor {name}"
            raise PartitionError(f"{self.source} {state}") from None

    def _open_shards(self, directory: Path) -> dict[str, Shard]:
        """Open the weight files, safetensors first, and say which of them holds which tensor."""
        for file_name, open_shard in _WEIGHT_FILES:
            if (directory / file_name).exists():
                shard = open_shard(directory / file_name)
                self._shards.append(shard)
                return {name: shard for name in shard.names() if not is_derived(name)}
            index = directory / f"{file_name}.index.json"
            if index.exists():
                return self._open_indexed(index, open_shard)
        raise PartitionError(
            f"{directory} holds no weights: expected model.safetensors or pytorch_model.bin, or "
            "the index.json of a sharded one"
        )

    def _open_indexed(self, index: Path, open_shard: Callable[[Path], Shard]) -> dict[str, Shard]:
        opened: dict[str, Shard] = {}
        where: dict[str, Shard] = {}
        for name, file_name in _weight_map(index).items():
            if file_name not in opened:
                path = index.parent / file_name
                if not path.exists():
                    raise PartitionError(
                        f"{index} names {file_name}, which is missing from {index.parent}; "
                        "download it again"
                    )
                opened[file_name] = open_shard(path)
                self._shards.append(opened[file_name])
            if name not in opened[file_name].names():
                raise PartitionError(f"{index} looks for {name} in {file_name}, which lacks it")
            if not is_derived(name):
                where[name] = opened[file_name]
        return where

    def _drop_tied_head(self) -> None:
        """Accept a stored LM head beside a tied embedding only if it is that embedding."""
        if not self.config.tie_word_embeddings or LM_HEAD not in self._where:
            return
        if EMBED_TOKENS in self._where and not torch.equal(
            self.read(LM_HEAD), self.read(EMBED_TOKENS)
        ):
            raise PartitionError(
                f"{self.source}: config.json ties lm_head.weight to the embedding, but the stored "
                "one differs; set tie_word_embeddings to false if the stored one is right"
            )
        del self._where[LM_HEAD]


def _read_config(directory: Path) -> DecoderConfig:
    """config.json, with the token ids of generation_config.json where it gives them."""
    path = directory / "config.json"
    fields = read_json(path)
    generation = directory / "generation_config.json"
    if generation.exists():
        generation_fields = read_json(generation)
        for key in ("bos_token_id", "eos_token_id"):
            if generation_fields.get(key) is not None:
                fields[key] = generation_fields[key]
    try:
        return from_hf_config(fields)
    except PartitionError as error:
        raise PartitionError(f"{path}: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor; every file lies in the directory of the index itself."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PartitionError(f"{index} has no weight_map")
    for file_name in weight_map.values():
        # A plain name, with no separator in it, cannot lead out of the directory. (Resolving
        # the path says less: a hub cache is made of links that do lead out.)
        if not isinstance(file_name, str) or not _PLAIN_NAME.fullmatch(file_name):
            raise PartitionError(
                f"{index} names {file_name!r}; shards must be plain file names in its directory"
            )
    return weight_map


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file of bounded size; PartitionError if it holds none."""
    try:
        with open_plain(path) as file:
            text = file.read(MAX_JSON_NBYTES + 1)
        if len(text) > MAX_JSON_NBYTES:
            raise PartitionError(f"{path} is larger than {MAX_JSON_NBYTES // 2**20} MiB")
        value = parse_json(text)
    except FileNotFoundError as error:
        raise PartitionError(
            f"{path} does not exist; name a Hugging Face model directory, or a .gguf file"
        ) from error
    except OSError as error:
        raise PartitionError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise PartitionError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise PartitionError(f"{path} must hold a JSON object")
    return value
