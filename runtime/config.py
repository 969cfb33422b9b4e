"""The YAML files of the two daemons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from privatelora.runtime.sampling_params import SamplingParams
from privatelora.yaml_file import read_yaml

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
CodecName = Literal["fp32", "fp16", "bf16"]
DEVICE_PATTERN = r"^(cpu|cuda(:\d{1,2})?)$"


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    """Paths in a file are relative to it, so that a deployment can be moved as a folder."""
    path = path.expanduser()
    directory = (info.context or {}).get("directory")
    return path if directory is None else directory / path


ConfigPath = Annotated[Path, AfterValidator(_beside_the_file)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CloudConfig(_Settings):
    """Settings of ``privatelora-serve``."""

    listen: str
    """Address to listen on, such as ``tcp://127.0.0.1:18230``."""
    shard: ConfigPath
    """The ``cloud`` folder that ``privatelora partition`` wrote."""
    device: str = Field(default="cpu", pattern=DEVICE_PATTERN)
    dtype: DtypeName = "auto"
    """Compute dtype; ``auto`` is the shard's."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads for tensor work; default: all cores."""
    max_sessions: int = Field(default=64, gt=0)
    max_positions: int = Field(default=8192, gt=0)
    """Longest sequence offered, bounded by the model's context."""
    max_cached_positions: int = Field(default=131072, gt=0)
    """KV cache positions reserved over all sessions; beyond it new sessions are refused."""
    max_frame_mib: int = Field(default=64, gt=0, le=4095)
    spin_us: int = Field(default=0, ge=0, le=10_000)
    """Look for the next frame this long before sleeping: faster on one machine or a fast LAN,
    for a core kept busy while answers are generated."""


class PayloadConfig(_Settings):
    """How numbers are written on the wire."""

    hidden_states: CodecName = "fp16"
    exchange: CodecName = "fp16"


class EdgeConfig(_Settings):
    """Settings of ``privatelora-edge`` and ``privatelora chat``."""

    cloud: str
    """Address of the cloud, such as ``tcp://cloud.example:18230``."""
    shard: ConfigPath
    """The ``edge`` folder that ``privatelora partition`` wrote."""
    adapter: ConfigPath | None = None
    """The adapter file; without one the model is the base model."""
    dtype: DtypeName = "auto"
    num_threads: int | None = Field(default=None, gt=0)
    max_positions: int = Field(default=2048, gt=0)
    """Longest conversation, bounded by what the cloud offers."""
    prefill_chunk: int = Field(default=256, gt=0)
    """Most prompt tokens in one step."""
    payload: PayloadConfig = PayloadConfig()
    system_prompt: str | None = None
    sampling: SamplingParams = SamplingParams()
    """Defaults that a request may override."""
    connect_timeout_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    step_timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Longest wait for one answer of the cloud."""
    max_frame_mib: int = Field(default=64, gt=0, le=4095)
    spin_us: int = Field(default=0, ge=0, le=10_000)
    """As the cloud's."""


def load_cloud_config(path: Path) -> CloudConfig:
    """Read a cloud's YAML file; ConfigError says what is wrong and where."""
    return read_yaml(path, CloudConfig)


def load_edge_config(path: Path) -> EdgeConfig:
    """Read an edge's YAML file; ConfigError says what is wrong and where."""
    return read_yaml(path, EdgeConfig)
