"""From what a person calls a model to a reader: path, hub id, or installed package."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from huggingface_hub import snapshot_download

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint.base import Checkpoint
from privatelora.partition.checkpoint.gguf_file import GgufCheckpoint
from privatelora.partition.checkpoint.hf import HfCheckpoint

PACKAGE_PREFIX = "pypi:"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_CONFIG_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
_SAFETENSORS_FILES = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_BIN_FILES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def open_checkpoint(model: str) -> Checkpoint:
    """Open a model for reading.

    ``model`` is a Hugging Face model directory, a ``.gguf`` file, ``pypi:NAME`` for a GGUF
    file inside an installed package, or, if no such path exists, a hub id ``org/name``, which
    is downloaded into the Hugging Face cache. Raises PartitionError if it cannot be found, is
    damaged, or is a model the engine does not compute.
    """
    if model.startswith(PACKAGE_PREFIX):
        return GgufCheckpoint(_packaged_gguf(model.removeprefix(PACKAGE_PREFIX)), model)
    path = Path(model)
    if path.is_dir():
        return HfCheckpoint(path)
    if path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.exists():
        raise PartitionError(f"{model} is neither a model directory nor a .gguf file")
    if _HUB_ID.fullmatch(model):
        return HfCheckpoint(_download(model), model)
    raise PartitionError(
        f"{model} does not exist; name a model directory, a .gguf file, pypi:NAME, or a hub id "
        "org/name"
    )


def _packaged_gguf(name: str) -> Path:
    """Path of the one GGUF file that an installed distribution brings; its code is not run."""
    try:
        files = metadata.files(name)
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise PartitionError(
            f"package {name!r} is not installed; run: pip install --no-deps {name}"
        ) from error
    found = [file for file in files or [] if file.suffix == ".gguf"]
    if len(found) != 1:
        raise PartitionError(
            f"package {name!r} holds {len(found)} .gguf files; pypi:NAME needs a package with one"
        )
    return Path(str(found[0].locate()))


def _download(repo_id: str) -> Path:
    """Fetch a hub repository, or find it in the cache; ``.bin`` weights only if need be."""
    try:
        directory = Path(
            snapshot_download(repo_id, allow_patterns=_CONFIG_FILES + _SAFETENSORS_FILES)
        )
        if not list(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(repo_id, allow_patterns=_CONFIG_FILES + _BIN_FILES))
    except Exception as error:  # its HTTP library's exceptions come through, whichever it uses
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PartitionError(
            f"{repo_id} is no path here and could not be fetched from the Hugging Face hub "
            f"({reason}); check the name and the network, or download it elsewhere and name its "
            "directory"
        ) from error
    return directory
