"""The parts of the YAML files that both daemons or their connection need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

from privatelora.errors import ConfigError
from privatelora.runtime.codecs import CodecPreferences
from privatelora.runtime.payload.names import CODEC_NAMES
from privatelora.transports.base import Credentials, CurveCredentials, TlsCredentials
from privatelora.transports.emulated_link import Impairment


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    """Paths in a file are relative to it, so that a deployment can be moved as a folder."""
    path = path.expanduser()
    directory = (info.context or {}).get("directory")
    return path if directory is None else directory / path


ConfigPath = Annotated[Path, AfterValidator(_beside_the_file)]


class Settings(BaseModel):
    """A section of a file: it cannot be changed, and has no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TlsConfig(Settings):
    """Files (PEM) for ``tls://``; see TlsCredentials."""

    certificate: ConfigPath | None = None
    key: ConfigPath | None = None
    trust: ConfigPath | None = None


class CurveConfig(Settings):
    """Files for CURVE on ``zmq+tcp://`` and ``zmq+ipc://``; see CurveCredentials."""

    key: ConfigPath
    trust: ConfigPath


def credentials(tls: TlsConfig | None, curve: CurveConfig | None) -> Credentials:
    """Settings as the transports take them."""
    return Credentials(
        tls=None if tls is None else TlsCredentials(tls.certificate, tls.key, tls.trust),
        curve=None if curve is None else CurveCredentials(curve.key, curve.trust),
    )


class LinkConfig(Settings):
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


class DirectionConfig(Settings):
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


class PayloadConfig(Settings):
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


class ImpairmentConfig(Settings):
    """What one direction of a rehearsed network does; see Impairment."""

    bandwidth_mbps: float | None = None
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    stall_probability: float = 0.0
    stall_ms: float = 0.0
    truncate_probability: float = 0.0
    corrupt_probability: float = 0.0
    drop_probability: float = 0.0

    @model_validator(mode="after")
    def _possible(self) -> ImpairmentConfig:
        try:
            self.impairment()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def impairment(self) -> Impairment:
        """As the transports take it."""
        return Impairment(**self.model_dump())


class ImpairedConfig(Settings):
    """A worse network than there is, to rehearse a deployment on one machine.

    ``up``: from edge to cloud. ``seed``: of jitter and faults.
    """

    up: ImpairmentConfig = ImpairmentConfig()
    down: ImpairmentConfig = ImpairmentConfig()
    seed: int = 0
