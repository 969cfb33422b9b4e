"""The YAML files of the two daemons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from privatelora.errors import ConfigError
from privatelora.runtime.link_config import ConfigPath, ImpairedConfig, LinkConfig, PayloadConfig
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.transports.address import parse_address
from privatelora.yaml_file import read_yaml

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
DEVICE_PATTERN = r"^(cpu|cuda(:\d{1,2})?)$"


def parse_metrics_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port``; port 0 is any free one. Raises ConfigError."""
    try:
        address = parse_address(f"http://{text}")
        address.require_options()
        host, port = address.require_listen()
    except ConfigError as error:
        raise ConfigError(f"expected host:port, such as 127.0.0.1:9464, not {text!r}") from error
    if host == "*":
        raise ConfigError("for all interfaces set 0.0.0.0:PORT or [::]:PORT, not '*'")
    return host, port


def _check_metrics_address(text: str) -> str:
    try:
        parse_metrics_address(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


class CloudConfig(LinkConfig):
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
    """KV cache positions of all sessions together. Idle sessions lose theirs first."""
    max_sessions_per_client: int = Field(default=16, gt=0)
    """A client is a key or certificate, or else a machine."""
    max_waiting: int = Field(default=64, ge=0)
    """Sessions that wait for room, at most ``max_wait_s``; beyond that they are refused."""
    max_wait_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    min_idle_s: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """How long a session must be idle before its memory may go to another; it is rebuilt when its
    conversation goes on."""
    max_batch_rows: int = Field(default=128, gt=0)
    """Rows computed at once: more is faster for long prompts, and holds up short answers."""
    metrics: Annotated[str, AfterValidator(_check_metrics_address)] | None = None
    """``host:port`` to serve metrics for Prometheus at; it is neither encrypted nor guarded."""
    trace: ConfigPath | None = None
    """Chrome trace of the first steps, written when the cloud ends."""


class EdgeConfig(LinkConfig):
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
    prefill_chunk: int = Field(default=64, gt=0)
    """Most prompt tokens in one step. Steps overlap, so small ones hide the network best, and keep
    others on the cloud waiting least; much smaller ones cost more time for each token."""
    payload: PayloadConfig = PayloadConfig()
    impaired: ImpairedConfig | None = None
    system_prompt: str | None = None
    sampling: SamplingParams = SamplingParams()
    """Defaults that a request may override."""
    connect_timeout_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    step_timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Longest wait for one answer of the cloud."""


def load_cloud_config(path: Path) -> CloudConfig:
    """Read a cloud's YAML file; ConfigError says what is wrong and where."""
    return read_yaml(path, CloudConfig)


def load_edge_config(path: Path) -> EdgeConfig:
    """Read an edge's YAML file; ConfigError says what is wrong and where."""
    return read_yaml(path, EdgeConfig)
