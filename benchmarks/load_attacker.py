"""The attacker of ``privatelora-bench load``, and what it attacks for comparison.

    python -m privatelora.benchmarks.load_attacker SETTINGS.yaml
    -> {"address": "tcp://127.0.0.1:40123", "kinds": ["idle", "slow"]}
    <- {"event": "attacking", "counts": {"opened": 600, ...}}
    -> {}
    <- {"event": "stopped", "counts": {...}}

    python -m privatelora.benchmarks.load_attacker SETTINGS.yaml bystander
    <- {"event": "ready", "address": "tcp://127.0.0.1:40124"}

A bystander accepts and takes in what comes, and does nothing else. Both have a low priority, as
an attack comes from elsewhere and should not compete for the processors.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

from pydantic import BaseModel, ConfigDict

from privatelora.benchmarks.load_attacks import Attack, Weapons
from privatelora.cli._input import read_lines
from privatelora.runtime.link_config import TlsConfig
from privatelora.runtime.loop import run, wait_for_stop
from privatelora.transports.base import TlsCredentials
from privatelora.transports.tls_context import client_context, server_context
from privatelora.transports.tls_stream import GREETING
from privatelora.yaml_file import read_yaml

NICENESS = 10


class AttackerConfig(BaseModel):
    """What the attacks consist of, see ``Weapons``; written by the benchmark.

    ``hello``: in hexadecimal.
    """

    model_config = ConfigDict(extra="forbid")

    hello: str
    max_frame_nbytes: int
    rate: float
    num_idle: int
    num_slow: int
    tls: TlsConfig | None


class AttackRequest(BaseModel):
    """Whom to attack, and how."""

    model_config = ConfigDict(extra="forbid")

    address: str
    kinds: list[str]


async def attack(config: AttackerConfig, lines: AsyncIterator[str]) -> None:
    """Carry out attacks, each from one line to the next."""
    context = None
    if config.tls is not None:
        context = client_context(TlsCredentials(trust=config.tls.trust))
    weapons = Weapons(
        hello=bytes.fromhex(config.hello),
        max_frame_nbytes=config.max_frame_nbytes,
        rate=config.rate,
        num_idle=config.num_idle,
        num_slow=config.num_slow,
        context=context,
    )
    async for line in lines:
        request = AttackRequest.model_validate_json(line)
        under_way = Attack(request.address, request.kinds, weapons)
        await under_way.begin()
        _say("attacking", counts=asdict(under_way.counts))
        await anext(lines)
        await under_way.aclose()
        _say("stopped", counts=asdict(under_way.counts))


class _Bystander(asyncio.Protocol):
    def __init__(self, greeting: bytes) -> None:
        self._greeting = greeting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._greeting)


async def stand_by(config: AttackerConfig) -> None:
    """Accept whatever comes until stopped."""
    scheme, context, greeting = "tcp", None, b""
    if config.tls is not None:
        credentials = TlsCredentials(config.tls.certificate, config.tls.key)
        scheme, context, greeting = "tls", server_context(credentials), GREETING
    server = await asyncio.get_running_loop().create_server(
        lambda: _Bystander(greeting), "127.0.0.1", 0, ssl=context, backlog=1024
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        _say("ready", address=f"{scheme}://127.0.0.1:{port}")
        await wait_for_stop()


def _say(event: str, **values: object) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def main() -> None:
    """Attack, or be attacked."""
    config = read_yaml(Path(sys.argv[1]), AttackerConfig)
    os.nice(NICENESS)
    if sys.argv[2:] == ["bystander"]:
        run(stand_by(config))
    else:
        run(attack(config, read_lines()))


if __name__ == "__main__":
    main()
