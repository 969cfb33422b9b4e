"""The parts of the YAML files that both daemons or their connection need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

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

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TlsConfig(Settings):
    """Files (PEM) for ``tls://``; see TlsCredentials."""

    certificate: ConfigPath | None = None
    """What this end shows; a cloud needs one, an edge where the cloud asks for it."""
    key: ConfigPath | None = None
    """The certificate's secret key."""
    trust: ConfigPath | None = None
    """Certificates that the other end must have: a file, or a folder of *.crt and *.pem. Without
    it an edge trusts the authorities that this system trusts, and a cloud every edge."""


class CurveConfig(Settings):
    """Files for CURVE on ``zmq+tcp://`` and ``zmq+ipc://``; see CurveCredentials."""

    key: ConfigPath
    """This end's secret key (.key)."""
    trust: ConfigPath
    """Public key (.pub) of the cloud; for a cloud that of an edge, or a folder of them."""


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
    """Largest message that is taken from the other end."""
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


_CodecName = Literal[CODEC_NAMES]  # type: ignore[valid-type]  # for the schema only

CodecChoice = Annotated[
    tuple[Annotated[str, AfterValidator(_known_codec)], ...],
    BeforeValidator(_as_list, json_schema_input_type=_CodecName | tuple[_CodecName, ...]),
    Field(min_length=1),
]
"""One codec, or several in order of preference; the first that the cloud knows is used."""


def _or_one_name(schema: JsonSchemaValue) -> JsonSchemaValue:
    """A section, or the name of one codec for all of it."""
    return {"anyOf": [schema, {"enum": list(CODEC_NAMES), "type": "string"}]}


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

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return _or_one_name(handler(schema))


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

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return _or_one_name(handler(schema))

    def preferences(self) -> CodecPreferences:
        """What to agree on with the cloud."""
        up, down = self.up, self.down
        return CodecPreferences(up.hidden_states, up.exchange, down.hidden_states, down.exchange)


class ImpairmentConfig(Settings):
    """What one direction of a rehearsed network does; see Impairment."""

    bandwidth_mbps: float | None = None
    """Megabits per second."""
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    """Each frame is up to this much earlier or later."""
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
    """A worse network than there is, to rehearse a deployment on one machine."""

    up: ImpairmentConfig = ImpairmentConfig()
    """From edge to cloud."""
    down: ImpairmentConfig = ImpairmentConfig()
    """From cloud to edge."""
    seed: int = 0
    """Of jitter and faults."""
