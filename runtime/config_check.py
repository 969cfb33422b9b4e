"""Whether a file of settings is right: its keys and values, and everything that it refers to."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from privatelora.errors import ConfigError
from privatelora.partition.adapter import load_adapter
from privatelora.partition.layout import ShardRole
from privatelora.partition.plan_file import PlanOptions
from privatelora.partition.shard import Shard, open_shard
from privatelora.runtime.client_tokens import load_tokens, token_to_send
from privatelora.runtime.config import CloudConfig, EdgeConfig
from privatelora.runtime.device import compute_device
from privatelora.runtime.host_port import is_loopback, parse_host_port
from privatelora.runtime.link_check import Findings, check_link
from privatelora.runtime.secret_config import SecretConfig
from privatelora.yaml_file import as_model, read_mapping

MAX_COMPARED_KEYS = 200
"""More than any kind has; to compare takes a moment for each."""
MODELS: dict[str, type[BaseModel]] = {
    "cloud": CloudConfig,
    "edge": EdgeConfig,
    "plan": PlanOptions,
}
"""By the kind of file."""


@dataclass(frozen=True)
class Report:
    """``kind``: cloud, edge, plan or another that was asked for; None where it cannot be told."""

    file: Path
    kind: str | None
    findings: Findings

    @property
    def is_right(self) -> bool:
        """Whether the file can be used; there may be warnings."""
        return not self.findings.errors


def check_file(path: Path, models: Mapping[str, type[BaseModel]] = MODELS) -> Report:
    """Check a file and, if it is a daemon's, everything that it refers to.

    ``models``: by the kind of file, MODELS and others. No secret gets into the report.
    """
    findings = Findings()
    kind: str | None = None
    with findings.about(""):
        values = read_mapping(path, "listen")
        kind = kind_of(values, path, models)
        config = as_model(values, path, models[kind])
        if isinstance(config, CloudConfig):
            _check_cloud(config, findings)
        elif isinstance(config, EdgeConfig):
            _check_edge(config, findings)
        elif isinstance(config, PlanOptions):
            config.check()
    return Report(path, kind, findings)


def kind_of(
    values: Mapping[Any, Any], path: Path, models: Mapping[str, type[BaseModel]] = MODELS
) -> str:
    """Which kind of file has these keys, or most of them. ConfigError if none has any."""

    def likeness(kind: str) -> float:
        known = models[kind].model_fields
        # Half for what may be misspelt.
        return sum(
            1.0 if key in known else 0.5 * bool(difflib.get_close_matches(str(key)[:64], known))
            for key in islice(values, MAX_COMPARED_KEYS)
        )

    kind = max(models, key=likeness)
    if not likeness(kind):
        raise ConfigError(
            f"{path}: neither a cloud's file (listen: ...) nor an edge's (cloud: ...) nor a plan "
            "(rank_up: ...)"
        )
    return kind


def _check_cloud(config: CloudConfig, findings: Findings) -> None:
    check_link("listen", config, findings, listens=True)
    if config.tokens is not None:
        with findings.about("tokens"):
            load_tokens(config.tokens)
    _open_shard(config.shard, "cloud", findings)
    with findings.about("device"):
        compute_device(config.device)
    if config.trace is not None and not os.access(config.trace.parent, os.W_OK):
        with findings.about("trace"):
            raise ConfigError(f"cannot write into {config.trace.parent}; name another file")
    if config.metrics is not None:
        host, _ = parse_host_port(config.metrics)
        if not is_loopback(host):
            findings.warn(
                "metrics",
                f"{config.metrics} answers everybody who can reach it; listen on 127.0.0.1, or "
                "let a firewall keep others out",
            )


def _check_edge(config: EdgeConfig, findings: Findings) -> None:
    check_link("cloud", config, findings, listens=False)
    if config.token is not None:
        with findings.about("token"):
            token_to_send(config.token, config.cloud, with_curve=config.curve is not None)
        _check_private("token", config.token, findings)
    if config.http.api_key is not None:
        with findings.about("http.api_key"):
            config.http.api_key.read()
        _check_private("http.api_key", config.http.api_key, findings)
    shard = _open_shard(config.shard, "edge", findings)
    for key, path in _adapters(config).items():
        with findings.about(key):
            if not path.is_file():
                raise ConfigError(f"{path} does not exist; make one with privatelora adapter init")
            if shard is not None:
                prints = shard.manifest.fingerprints
                load_adapter(path, shard.manifest.plan, prints.basis, prints.model)
            findings.check_private(key, path)
    if config.impaired is not None:
        findings.warn("impaired", "rehearses a worse network; leave it out for real use")


def _adapters(config: EdgeConfig) -> dict[str, Path]:
    """All adapter files by their key."""
    files = {f"adapters.{name}": path for name, path in config.adapters.items()}
    return files if config.adapter is None else {"adapter": config.adapter, **files}


def _open_shard(path: Path, role: ShardRole, findings: Findings) -> Shard | None:
    opened: list[Shard] = []
    with findings.about("shard"):
        opened.append(open_shard(path, role))
    return opened[0] if opened else None


def _check_private(key: str, secret: SecretConfig, findings: Findings) -> None:
    if secret.file is not None:
        findings.check_private(key, secret.file)
