"""The YAML files of the two daemons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from privatelora.errors import ConfigError
from privatelora.runtime.host_port import HostPort, is_remote
from privatelora.runtime.http_config import HttpConfig
from privatelora.runtime.link_config import (
    ConfigPath,
    ImpairedConfig,
    LinkConfig,
    PayloadConfig,
    Settings,
)
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.runtime.secret_config import SecretConfig
from privatelora.transports.address import Address, parse_address
from privatelora.yaml_file import read_yaml

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
DEVICE_PATTERN = r"^(cpu|cuda(:\d{1,2})?)$"


class CloudTrainingConfig(Settings):
    """Lets edges train through the cloud's frozen layers; ``training: {}`` is enough."""

    max_rows: int = Field(default=4096, gt=0)
    """Tokens of all sequences of one batch. A trainer holds up to two batches, each with the hidden
    states of all its tokens for every layer."""
    max_sessions: int = Field(default=4, gt=0)
    """Trainers at once. An idle one loses its place to another, and comes back by itself."""


class CloudConfig(LinkConfig):
    """Settings of ``privatelora-serve``."""

    listen: str
    """Address to listen on, such as ``tcp://127.0.0.1:18230``. One that other machines reach needs
    a way to tell who comes: ``tls://`` with ``tls.trust`` or ``tokens``, or ``zmq+tcp://`` with
    ``curve``."""
    open_to_all: bool = False
    """Let in whoever reaches the address, without proof of who it is: for a network that lets in
    nobody else, such as that between two containers."""
    shard: ConfigPath
    """The ``cloud`` folder that ``privatelora partition`` wrote."""
    device: str = Field(default="cpu", pattern=DEVICE_PATTERN)
    """``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: DtypeName = "auto"
    """Compute dtype; ``auto`` is the shard's."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads for tensor work; default: all cores."""
    max_connections: int = Field(default=1024, gt=0)
    """Edges connected at once; others are turned away."""
    max_connections_per_client: int = Field(default=64, gt=0)
    """A client is a certificate, a key or a token, or else a machine."""
    max_silence_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """How long nothing may come from an edge before its connection is dropped. Edges that have
    nothing to say ask every ``keepalive_s`` whether the cloud is there."""
    max_sessions: int = Field(default=64, gt=0)
    """Conversations that are held at once; others wait."""
    max_positions: int = Field(default=8192, gt=0)
    """Longest sequence offered, bounded by the model's context."""
    max_cached_positions: int = Field(default=131072, gt=0)
    """KV cache positions of all sessions together. Idle sessions lose theirs first."""
    max_sessions_per_client: int = Field(default=16, gt=0)
    """Open or waiting."""
    max_cached_positions_per_client: int | None = Field(default=None, gt=0)
    """KV cache positions of all sessions of one client together; its own idle sessions lose theirs
    first, and no other's. Default: all there are."""
    max_steps_per_s_per_client: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Steps, each a decoded token or a chunk of a prompt, that one client may begin in a second.
    Those beyond it begin later. Default: no limit."""
    tokens: ConfigPath | None = None
    """File of ``NAME: DIGEST`` lines, those that ``privatelora keys token`` prints. With it an edge
    needs one of these tokens, unless it has proven who it is by certificate or key."""
    max_waiting: int = Field(default=64, ge=0)
    """Sessions that wait for room, at most ``max_wait_s``; beyond that they are refused."""
    max_wait_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """How long a session waits for room before it is refused."""
    min_idle_s: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """How long a session must be idle before its memory may go to another; it is rebuilt when its
    conversation goes on."""
    resume_timeout_s: float = Field(default=120.0, ge=0, allow_inf_nan=False)
    """How long what a session has cached is kept when its connection is lost, for its edge to come
    back; memory that others need is taken from there first. 0: not at all."""
    max_batch_rows: int | None = Field(default=None, gt=0)
    """Rows computed at once: more is faster for long prompts, and holds up the answers of others.
    Default: 64 on a processor, where others keep their fair share of the time with that, and 512 on
    a GPU."""
    training: CloudTrainingConfig | None = None
    """Default: nobody trains here."""
    metrics: HostPort | None = None
    """``host:port`` of a small HTTP server: ``/metrics`` for Prometheus, ``/health/live`` and
    ``/health/ready``. It is neither encrypted nor guarded."""
    drain_timeout_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """How long answers under way may take to their end when the cloud is asked to stop."""
    trace: ConfigPath | None = None
    """Chrome trace of the first steps, written when the cloud ends."""

    @model_validator(mode="after")
    def _guarded(self) -> CloudConfig:
        try:
            address = parse_address(self.listen)
        except ConfigError:
            return self  # whoever listens on it says what is wrong
        if self.open_to_all or not is_remote(address) or self._knows_who_comes(address):
            return self
        raise ValueError(
            f"listen: everybody who can reach {address} would be let in; use tls:// with tls.trust "
            "or tokens, or zmq+tcp:// with curve (privatelora keys makes them all), listen on "
            "127.0.0.1, or set open_to_all: true where the network lets in nobody else"
        )

    def _knows_who_comes(self, address: Address) -> bool:
        if address.scheme == "tls":
            return self.tokens is not None or (self.tls is not None and self.tls.trust is not None)
        return address.scheme == "zmq+tcp" and self.curve is not None


class EdgeConfig(LinkConfig):
    """Settings of ``privatelora-edge`` and ``privatelora chat``."""

    cloud: str
    """Address of the cloud, such as ``tcp://cloud.example:18230``."""
    token: SecretConfig | None = None
    """Where the token is with which this edge proves who it is: ``file: PATH`` or ``env: NAME``.
    It is only sent encrypted, or within this machine."""
    shard: ConfigPath
    """The ``edge`` folder that ``privatelora partition`` wrote."""
    adapter: ConfigPath | None = None
    """The adapter file, offered under its name without the ending."""
    adapters: dict[ModelName, ConfigPath] = Field(default_factory=dict)
    """Further ones, each under a name of its own."""
    base_model: ModelName = "base"
    """The name of the model without an adapter. Requests that name no model get ``adapter``, else
    the first of ``adapters``, else this."""
    max_conversations: int = Field(default=8, gt=0)
    """Conversations kept ready at once, each a session on the cloud."""
    max_waiting: int = Field(default=32, ge=0)
    """Requests that wait while all conversations are busy; beyond that they are refused."""
    dtype: DtypeName = "auto"
    """Compute dtype; ``auto`` is the shard's."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads for tensor work; default: all cores."""
    max_positions: int = Field(default=2048, gt=0)
    """Longest conversation, bounded by what the cloud offers."""
    prefill_chunk: int = Field(default=64, gt=0)
    """Most prompt tokens in one step. Steps overlap, so small ones hide the network best, and keep
    others on the cloud waiting least; much smaller ones cost more time for each token."""
    payload: PayloadConfig = PayloadConfig()
    impaired: ImpairedConfig | None = None
    system_prompt: str | None = None
    """Said first in conversations that do not begin with one of their own."""
    sampling: SamplingParams = SamplingParams()
    """Defaults that a request may override."""
    http: HttpConfig = HttpConfig()
    connect_timeout_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """Longest wait for a connection to the cloud."""
    step_timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Longest wait for one answer of the cloud."""
    keepalive_s: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    """After this long without a word the cloud is asked whether it is there, and after as long
    again without an answer the connection counts as lost."""
    reconnect_timeout_s: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    """How long an answer under way waits for a cloud that was lost, to go on where it was."""

    @model_validator(mode="after")
    def _names_differ(self) -> EdgeConfig:
        names = [*self.adapters, self.base_model]
        if self.adapter is not None:
            names.append(self.adapter.stem)
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two models are named {twice}: give one of them another name")
        return self

    def adapter_files(self) -> dict[str, Path]:
        """All adapters by name, the default first."""
        alone = {} if self.adapter is None else {self.adapter.stem: self.adapter}
        return {**alone, **self.adapters}


def load_cloud_config(path: Path) -> CloudConfig:
    """Read a cloud's YAML file; ConfigError says what is wrong and where."""
    return read_yaml(path, CloudConfig)


def load_edge_config(path: Path) -> EdgeConfig:
    """Read an edge's YAML file; ConfigError says what is wrong and where."""
    return read_yaml(path, EdgeConfig)
