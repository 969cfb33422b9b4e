"""The YAML files of the two daemons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

from privatelora.runtime.codecs import CodecPreferences
from privatelora.runtime.payload.names import CODEC_NAMES
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.transports.base import Credentials, CurveCredentials, TlsCredentials
from privatelora.yaml_file import read_yaml

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
DEVICE_PATTERN = r"^(cpu|cuda(:\d{1,2})?)$"


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    """Paths in a file are relative to it, so that a deployment can be moved as a folder."""
    path = path.expanduser()
    directory = (info.context or {}).get("directory")
    return path if directory is None else directory / path


ConfigPath = Annotated[Path, AfterValidator(_beside_the_file)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TlsConfig(_Settings):
    """Files (PEM) for ``tls://``; see TlsCredentials."""

    certificate: ConfigPath | None = None
    key: ConfigPath | None = None
    trust: ConfigPath | None = None


class CurveConfig(_Settings):
    """Files for CURVE on ``zmq+tcp://`` and ``zmq+ipc://``; see CurveCredentials."""

    key: ConfigPath
    trust: ConfigPath


def credentials(tls: TlsConfig | None, curve: CurveConfig | None) -> Credentials:
    """Settings as the transports take them."""
    return Credentials(
        tls=None if tls is None else TlsCredentials(tls.certificate, tls.key, tls.trust),
        curve=None if curve is None else CurveCredentials(curve.key, curve.trust),
    )


class _Link(_Settings):
    """What both ends of a connection set."""

    tls: TlsConfig | None = None
    curve: CurveConfig | None = None
    max_frame_mib: int = Field(default=64, gt=0, le=4095)
    spin_us: int | None = Field(default=None, ge=0, le=10_000)
    """Look for the next frame this long before sleeping: faster on one machine or a fast LAN,
    for a core kept busy while answers are generated. Default: what the transport thinks best."""

    @property
    def spin_s(self) -> float | None:
        """``spin_us`` in seconds."""
        return None if self.spin_us is None else self.spin_us * 1e-6

    def credentials(self) -> Credentials:
        """What this end proves itself with and whom it trusts."""
        return credentials(self.tls, self.curve)


class CloudConfig(_Link):
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


def _known_codec(name: str) -> str:
    if name not in CODEC_NAMES:
        raise ValueError(f"no payload codec {name!r}; choose from {', '.join(CODEC_NAMES)}")
    return name


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


CodecChoice = Annotated[
    tuple[Annotated[str, AfterValidator(_known_codec)], ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
]
"""One codec, or several in order of preference; the first that the cloud knows is used."""


class DirectionConfig(_Settings):
    """Codecs of one direction, by kind of tensor; one name stands for both."""

    hidden_states: CodecChoice
    exchange: CodecChoice

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, value: object) -> object:
        if isinstance(value, str):
            return {"hidden_states": value, "exchange": value}
        return value


class UpConfig(DirectionConfig):
    """From edge to cloud: hidden states in, y."""

    hidden_states: CodecChoice = ("int8", "fp16")
    exchange: CodecChoice = ("int6", "fp16")


class DownConfig(DirectionConfig):
    """From cloud to edge: hidden states out, z."""

    # Logits are read off these hidden states directly: rounding them changes tokens first.
    hidden_states: CodecChoice = ("int12", "fp16")
    exchange: CodecChoice = ("int6", "fp16")


class PayloadConfig(_Settings):
    """How numbers are written on the wire; one name stands for everything.

    The defaults are the fewest bytes with which a model hardly ever prefers another token;
    ``privatelora-bench quality`` measures that.
    """

    up: UpConfig = UpConfig()
    down: DownConfig = DownConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, value: object) -> object:
        return {"up": value, "down": value} if isinstance(value, str) else value

    def preferences(self) -> CodecPreferences:
        """What to agree on with the cloud."""
        up, down = self.up, self.down
        return CodecPreferences(up.hidden_states, up.exchange, down.hidden_states, down.exchange)


class EdgeConfig(_Link):
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


def load_cloud_config(path: Path) -> CloudConfig:
    """Read a cloud's YAML file; ConfigError says what is wrong and where."""
    return read_yaml(path, CloudConfig)


def load_edge_config(path: Path) -> EdgeConfig:
    """Read an edge's YAML file; ConfigError says what is wrong and where."""
    return read_yaml(path, EdgeConfig)
