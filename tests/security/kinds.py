"""The files that somebody else may give: good ones, how they are spoilt, and who reads them."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import yaml

from privatelora.partition.adapter import read_adapter
from privatelora.partition.checkpoint.gguf_file import GgufCheckpoint
from privatelora.partition.checkpoint.hf import HfCheckpoint
from privatelora.partition.manifest import MANIFEST_NAME
from privatelora.partition.plan_file import read_plan_file
from privatelora.partition.published import read_published
from privatelora.partition.shard import open_shard
from privatelora.partition.tensor_file import open_tensor_file
from privatelora.partition.tokenizer import load_tokenizer
from tests.e2e.deployment import Deployment, split_checkpoint
from tests.partition.test_checkpoint_gguf import write_gguf
from tests.partition.tiny import save_tiny, tiny_tokenizer
from tests.security.mutations import spoil_bytes, spoil_json

SMALL: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 180,
}


class Kind(ABC):
    """A kind of file. ``path``: where a spoilt one is put; ``good``: what it was."""

    path: Path
    good: bytes

    @property
    def name(self) -> str:
        return type(self).__name__

    def spoil(self, rng: random.Random) -> bytes:
        return spoil_bytes(self.good, rng)

    @abstractmethod
    def read(self) -> None:
        """Open what lies at ``path``, and read all of it."""


class _JsonKind(Kind):
    """A file of JSON."""

    def spoil(self, rng: random.Random) -> bytes:
        return spoil_json(json.loads(self.good), rng)


def _spoil_tensor_file(good: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or another length before it."""
    start = 8 + int.from_bytes(good[:8], "little")
    if rng.random() < 0.3:
        return spoil_bytes(good, rng, 0, start)
    header = spoil_json(json.loads(good[8:start]), rng)
    length = len(header) if rng.random() < 0.9 else rng.randrange(2 * len(good))
    data = good[start:] if rng.random() < 0.8 else good[start : start + rng.randrange(len(good))]
    return length.to_bytes(8, "little") + header + data


class ShardTensors(Kind):
    """``model.safetensors`` of a shard."""

    def __init__(self, deployment: Deployment) -> None:
        self.path = deployment.cloud_shard / "model.safetensors"
        self.good = self.path.read_bytes()

    def spoil(self, rng: random.Random) -> bytes:
        return _spoil_tensor_file(self.good, rng)

    def read(self) -> None:
        with open_tensor_file(self.path) as file:
            for name in file.names:
                file.shape(name)
                file.dtype(name)
        open_shard(self.path.parent, "cloud").load()


class Manifest(_JsonKind):
    """``manifest.json`` of a shard."""

    def __init__(self, deployment: Deployment) -> None:
        self.path = deployment.edge_shard / MANIFEST_NAME
        self.good = self.path.read_bytes()

    def read(self) -> None:
        open_shard(self.path.parent, "edge").load()


class AdapterFile(Kind):
    """M."""

    def __init__(self, deployment: Deployment) -> None:
        self.path = deployment.adapter_file
        self.good = self.path.read_bytes()

    def spoil(self, rng: random.Random) -> bytes:
        return _spoil_tensor_file(self.good, rng)

    def read(self) -> None:
        read_adapter(self.path)


class Gguf(Kind):
    """A model in one file."""

    def __init__(self, directory: Path) -> None:
        self.path = write_gguf(directory / "model.gguf", **SMALL)
        self.good = self.path.read_bytes()
        self._header_nbytes = self.good.rindex(b"output_norm.weight") + 60

    def spoil(self, rng: random.Random) -> bytes:
        return spoil_bytes(self.good, rng, 0, self._header_nbytes)

    def read(self) -> None:
        with GgufCheckpoint(self.path) as checkpoint:
            for name in checkpoint.names():
                checkpoint.read(name)


class _HfFile(Kind):
    """A file of a Hugging Face directory."""

    def __init__(self, directory: Path, file: str, **options: Any) -> None:
        self.path = save_tiny("llama", directory / self.name, **options, **SMALL) / file
        self.good = self.path.read_bytes()

    def read(self) -> None:
        with HfCheckpoint(self.path.parent) as checkpoint:
            for name in checkpoint.names():
                checkpoint.read(name).sum()


class HfConfig(_HfFile, _JsonKind):
    """``config.json``."""


class HfIndex(_HfFile, _JsonKind):
    """``model.safetensors.index.json``."""


class HfTensors(_HfFile):
    """``model.safetensors`` of a model."""

    def spoil(self, rng: random.Random) -> bytes:
        return _spoil_tensor_file(self.good, rng)


class HfBin(_HfFile):
    """``pytorch_model.bin``."""


class PublishedAdapter(Kind):
    """The adapter file of the published system, whose pickle comes first."""

    def __init__(self, directory: Path, *, zipped: bool) -> None:
        self.path = directory / f"published-{zipped}.bin"
        prefix = "model.layers.0.self_attn.q_lora"
        parts = {"lora_A": (4, 16), "lora_mobile": (2, 4), "lora_B": (16, 2)}
        state = {f"{prefix}.{part}.weight": torch.ones(shape) for part, shape in parts.items()}
        torch.save(state, self.path, _use_new_zipfile_serialization=zipped)
        self.good = self.path.read_bytes()

    def read(self) -> None:
        read_published(self.path)


class PlanFile(Kind):
    """YAML."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "plan.yaml"
        plan = {"num_layers": 4, "layers": "0-3", "rank_up": 8, "targets": ["q", "v"], "every": 2}
        self._plan = plan
        self.good = yaml.safe_dump(plan).encode()

    def spoil(self, rng: random.Random) -> bytes:
        # JSON is YAML too.
        return spoil_json(self._plan, rng) if rng.random() < 0.6 else spoil_bytes(self.good, rng)

    def read(self) -> None:
        read_plan_file(self.path).check()


class TokenizerFile(_JsonKind):
    """``tokenizer.json``."""

    def __init__(self, directory: Path) -> None:
        tiny_tokenizer().save_pretrained(directory / "tokenizer")
        self.path = directory / "tokenizer" / "tokenizer.json"
        self.good = self.path.read_bytes()

    def read(self) -> None:
        load_tokenizer(self.path.parent)


def make_kinds(directory: Path) -> list[Kind]:
    """One of each, in ``directory``."""
    model = save_tiny("llama", directory / "model", **SMALL)
    deployment = split_checkpoint(str(model), directory / "shards", rank_up=4, rank_down=4)
    return [
        ShardTensors(deployment),
        Manifest(deployment),
        AdapterFile(deployment),
        Gguf(directory),
        HfConfig(directory, "config.json"),
        HfIndex(directory, "model.safetensors.index.json", sharded=True),
        HfTensors(directory, "model.safetensors"),
        HfBin(directory, "pytorch_model.bin", safe=False),
        PublishedAdapter(directory, zipped=True),
        PublishedAdapter(directory, zipped=False),
        PlanFile(directory),
        TokenizerFile(directory),
    ]
