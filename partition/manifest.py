"""The manifest of a shard: what it holds, and the fingerprints that tie two shards together.

A manifest may come from someone else. Reading one is bounded in size, allocates nothing by
what it says, and lets it name no file outside the shard's own tokenizer folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from privatelora.errors import PartitionError
from privatelora.partition.basis import BasisProvenance
from privatelora.partition.files import os_errors, parse_json, write_atomic
from privatelora.partition.layout import ROLES, ShardRole
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import MAX_LAYERS
from privatelora.partition.plan import Plan
from privatelora.partition.tensor_file import DTYPES, DtypeName
from privatelora.plain_file import open_plain
from privatelora.yaml_file import explain

FORMAT: Literal["privatelora-shard"] = "privatelora-shard"
FORMAT_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
TENSORS_NAME = "model.safetensors"
TOKENIZER_DIR = "tokenizer"
MAX_MANIFEST_NBYTES = 8 << 20
"""That of a decoder with 1024 layers has 5 MB."""
MAX_TOKENIZER_FILES = 64

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Fingerprints(NamedTuple):
    """What has to be equal on both sides (hex SHA-256 each)."""

    model: str
    plan: str
    basis: str


class TensorEntry(BaseModel):
    """One tensor of the shard's safetensors file; ``sha256`` is over its stored bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[NonNegativeInt, ...]
    dtype: DtypeName
    sha256: Sha256


class Manifest(BaseModel):
    """Content of ``manifest.json``.

    ``model_fingerprint`` is over the config and every source tensor's name, shape, dtype and
    bytes. ``files``: SHA-256 by path relative to the shard, all in ``tokenizer/``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["privatelora-shard"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    role: ShardRole
    config: DecoderConfig
    model_fingerprint: Sha256
    plan: Plan
    plan_fingerprint: Sha256
    basis: BasisProvenance
    basis_fingerprint: Sha256
    dtype: DtypeName
    tensors: dict[str, TensorEntry]
    files: dict[str, Sha256] = Field(default_factory=dict, max_length=MAX_TOKENIZER_FILES)

    @field_validator("files")
    @classmethod
    def _only_tokenizer_files(cls, files: dict[str, str]) -> dict[str, str]:
        for path in files:
            folder, _, name = path.partition("/")
            plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0")
            if folder != TOKENIZER_DIR or not plain:
                raise ValueError(f"{path!r} is not a plain file in {TOKENIZER_DIR}/")
        return files

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.config.num_layers > MAX_LAYERS:
            raise ValueError(f"the model has more than {MAX_LAYERS} layers")
        if self.plan.num_layers != self.config.num_layers:
            raise ValueError("plan and config name different numbers of layers")
        if self.plan.fingerprint != self.plan_fingerprint:
            raise ValueError("plan_fingerprint is not the fingerprint of the plan")
        return self

    @property
    def nbytes(self) -> int:
        """Size of all tensors as stored."""
        numel = sum(math.prod(entry.shape) for entry in self.tensors.values())
        return numel * DTYPES[self.dtype].itemsize

    @property
    def fingerprints(self) -> Fingerprints:
        """What the two ends compare before they work together."""
        return Fingerprints(self.model_fingerprint, self.plan_fingerprint, self.basis_fingerprint)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; PartitionError if that fails."""
    text = manifest.model_dump_json(indent=1, exclude_none=True)
    write_atomic(directory / MANIFEST_NAME, text.encode())


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of the shard in ``directory``.

    Raises PartitionError if there is none, if it is not readable or another format version,
    or if it contradicts itself.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        inner = [
            str(directory / role) for role in ROLES if (directory / role / MANIFEST_NAME).is_file()
        ]
        hint = (
            f"did you mean {' or '.join(inner)}?"
            if inner
            else "make one with privatelora partition"
        )
        raise PartitionError(f"{directory} is not a shard: it has no {MANIFEST_NAME}; {hint}")
    with os_errors(f"read {path}"), open_plain(path) as file:
        text = file.read(MAX_MANIFEST_NBYTES + 1)
    if len(text) > MAX_MANIFEST_NBYTES:
        raise PartitionError(f"{path} is larger than {MAX_MANIFEST_NBYTES} bytes: not a manifest")
    try:
        values = parse_json(text)
    except ValueError as error:
        raise PartitionError(f"{path} is damaged: not valid JSON ({error})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise PartitionError(f"{path} is not the manifest of a PrivateLoRA shard")
    if values.get("format_version") != FORMAT_VERSION:
        raise PartitionError(
            f"{path} has format version {values.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}; partition the model again with this program"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise PartitionError(f"{path} is damaged: {explain(error)}") from error


def check_pair(ours: Fingerprints, theirs: Fingerprints) -> None:
    """Raise PartitionError unless both ends' shards come from one model, plan and basis."""
    different = [
        name for name in Fingerprints._fields if getattr(ours, name) != getattr(theirs, name)
    ]
    if different:
        raise PartitionError(
            f"cloud and edge shard do not belong together: {' and '.join(different)} differ; "
            "use the two shards that one run of privatelora partition wrote"
        )
