"""What attacks on a cloud's port cost the sessions that work there.

Method. One cloud daemon, one edge whose sessions decode all along (``load_worker.py``), and one
attacker with a process of its own (``load_attacker.py``; its attacks are in ``load_attacks.py``).
In every round, each kind of attack, and all together, has three phases right after one another:
*quiet*; *attack*; and *control*, where the same attacker does the same to a bystander, a process
that accepts and takes in whatever comes and is no part of the deployment. So attack / quiet is
what a user sees on this machine, attacker included, and attack / control leaves out what the
attacker itself takes from the processors they share. From round to round attack and control
change places. An attack holds its connections before its phase begins, and goes on until after it.
Ratios are of one round. Attacker and bystander run with niceness 10.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from privatelora.benchmarks.load_attacks import frame
from privatelora.benchmarks.load_usage import Peak, Usage
from privatelora.benchmarks.measure import Spread, machine_facts, paired_ratios
from privatelora.benchmarks.serve import (
    ServeSettings,
    cloud_config,
    edge_config,
    prepare,
    write_settings,
)
from privatelora.cli._daemons import Daemon
from privatelora.errors import ConfigError
from privatelora.partition.manifest import read_manifest
from privatelora.runtime.link_config import LinkConfig
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.wire.codec import encode
from privatelora.runtime.wire.messages import Fingerprints, Hello, Role
from privatelora.transports.tls_keys import new_certificate

KINDS = {
    "tcp": ("dropped", "idle", "slow", "unread"),
    "tls": ("dropped", "abandoned", "idle", "slow", "unread"),
}
"""By transport; see ``load_attacks``."""
ALL = "all"
PHASES = ("quiet", "attack", "control")
SETTLE_S = 0.5
"""Between the end of an attack and the next phase."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class LoadSettings:
    """``kinds``: of ``KINDS``. ``seconds``: of a phase. For the rest see ``Weapons``.

    ConfigError for a kind that the transport does not have.
    """

    serving: ServeSettings
    transport: str
    kinds: tuple[str, ...]
    rounds: int
    seconds: float
    rate: float
    num_idle: int
    num_slow: int

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS[self.transport]:
                raise ConfigError(
                    f"no attack {kind!r} on {self.transport}://; choose from "
                    + ", ".join(KINDS[self.transport])
                )

    @property
    def num_sessions(self) -> int:
        """Sessions that decode."""
        return self.serving.sessions[0]


@dataclass
class _World:
    """The processes, by role, and what the cloud has logged."""

    cloud: Daemon
    edge: Daemon
    attacker: Daemon
    bystander: Daemon
    addresses: dict[str, str]
    """By phase, of what is attacked in it."""
    log: Path

    def usage(self) -> dict[str, Usage]:
        """Of every process."""
        roles = ("cloud", "edge", "attacker", "bystander")
        return {role: Usage.of(getattr(self, role).pid) for role in roles}

    def num_logged(self) -> int:
        """Lines in the cloud's log."""
        return self.log.read_bytes().count(b"\n")


def measure_load(settings: LoadSettings, report: Report) -> dict[str, Any]:
    """Measure every kind of attack, alone and together."""
    if sys.platform != "linux":
        raise ConfigError("this benchmark needs Linux: /proc, and many loopback addresses")
    report("splitting the model")
    round_trips = prepare(settings.serving)
    kinds = {kind: [kind] for kind in settings.kinds}
    if len(kinds) > 1:
        kinds[ALL] = list(kinds)
    phases: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    with _world(settings, report) as world:
        _phase(settings, world, "quiet", [])  # not counted: both ends warm up
        before = Usage.of(world.cloud.pid)
        for number in range(settings.rounds):
            for name, together in kinds.items():
                found: dict[str, Any] = {}
                for phase in ("quiet", *(PHASES[1:] if number % 2 == 0 else PHASES[:0:-1])):
                    report(f"round {number + 1} of {settings.rounds}: {name}, {phase}")
                    found[phase] = _phase(settings, world, phase, together)
                phases[name].append(found)
        time.sleep(SETTLE_S)
        after = Usage.of(world.cloud.pid)
    return {
        "benchmark": "load",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {
            **settings.serving.deployment,
            **{name: value for name, value in asdict(settings).items() if name != "serving"},
            "sessions": settings.num_sessions,
        },
        "round_trips_per_token": round_trips,
        "cloud_before": before._asdict(),
        "cloud_after": after._asdict(),
        "rows": [_row(name, rounds) for name, rounds in phases.items()],
    }


def _row(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    rates = {phase: [found[phase]["tokens_per_s"] for found in rounds] for phase in PHASES}
    attacks = [found["attack"] for found in rounds]
    return {
        "attack": name,
        "tokens_per_s": {phase: Spread.of(rates[phase])._asdict() for phase in PHASES},
        "vs_quiet": paired_ratios(rates["attack"], rates["quiet"])._asdict(),
        "vs_control": paired_ratios(rates["attack"], rates["control"])._asdict(),
        "control_vs_quiet": paired_ratios(rates["control"], rates["quiet"])._asdict(),
        "connections": {
            key: sum(found["connections"][key] for found in attacks)
            for key in attacks[0]["connections"]
        },
        "largest_gap_ms": {
            phase: max(found[phase]["largest_gap_ms"] for found in rounds) for phase in PHASES
        },
        "cpu_share": {
            phase: {
                role: sum(found[phase]["cpu_share"][role] for found in rounds) / len(rounds)
                for role in rounds[0][phase]["cpu_share"]
            }
            for phase in PHASES
        },
        "cloud_cpu_ms_per_token": {
            phase: Spread.of(
                [
                    found[phase]["cpu_share"]["cloud"] / found[phase]["tokens_per_s"] * 1e3
                    for found in rounds
                ]
            )._asdict()
            for phase in PHASES
        },
        "cloud_rss_mib_peak": max(found["cloud_rss_mib_peak"] for found in attacks),
        "cloud_descriptors_peak": max(found["cloud_descriptors_peak"] for found in attacks),
        "lines_logged": sum(found["lines_logged"] for found in attacks),
        "rounds": rounds,
    }


def _phase(settings: LoadSettings, world: _World, phase: str, kinds: list[str]) -> dict[str, Any]:
    connections: dict[str, int] = {}
    num_logged = world.num_logged()
    with Peak(world.cloud.pid) as peak:
        if phase != "quiet":
            request = {"address": world.addresses[phase], "kinds": kinds}
            world.attacker.write_line(json.dumps(request))
            world.attacker.read_event("attacking")
        before = world.usage()
        world.edge.write_line(json.dumps({"seconds": settings.seconds}))
        counted = world.edge.read_event("counted")
        after = world.usage()
    if phase != "quiet":
        world.attacker.write_line("{}")
        connections = world.attacker.read_event("stopped")["counts"]
        time.sleep(SETTLE_S)
    return {
        "tokens_per_s": counted["tokens"] / counted["seconds"],
        "largest_gap_ms": counted["largest_gap_ms"],
        "connections": connections,
        "cpu_share": {
            role: (after[role].cpu_s - before[role].cpu_s) / counted["seconds"] for role in before
        },
        "cloud_rss_mib_peak": peak.rss_mib,
        "cloud_descriptors_peak": peak.descriptors,
        "lines_logged": world.num_logged() - num_logged,
    }


@contextmanager
def _world(settings: LoadSettings, report: Report) -> Iterator[_World]:
    serving, directory = settings.serving, settings.serving.directory
    listener, client = _tls_settings(settings)
    cloud_file = write_settings(
        directory / "cloud.yaml",
        cloud_config(serving) | {"listen": f"{settings.transport}://127.0.0.1:0"} | listener,
    )
    attacker_file = write_settings(
        directory / "attacker.yaml",
        {
            "hello": _hello(directory).hex(),
            "max_frame_nbytes": LinkConfig().max_frame_mib * 2**20,
            "rate": settings.rate,
            "num_idle": settings.num_idle,
            "num_slow": settings.num_slow,
            "tls": {**listener.get("tls", {}), **client["tls"]} if client else None,
        },
    )
    log = directory / "cloud.log"
    with ExitStack() as stack:
        report("starting the daemons")
        cloud = stack.enter_context(
            Daemon("privatelora.cli.serve", cloud_file, log=stack.enter_context(log.open("w")))
        )
        address = cloud.read_address()
        edge_file = write_settings(directory / "edge.yaml", edge_config(address, 0.0) | client)
        edge = stack.enter_context(
            Daemon(
                "privatelora.benchmarks.load_worker",
                edge_file,
                *map(str, (settings.num_sessions, serving.prompt_tokens, serving.tokens)),
            )
        )
        attacking = "privatelora.benchmarks.load_attacker"
        attacker = stack.enter_context(Daemon(attacking, attacker_file))
        bystander = stack.enter_context(Daemon(attacking, attacker_file, "bystander"))
        edge.read_event("ready")
        addresses = {"attack": address, "control": bystander.read_event("ready")["address"]}
        yield _World(cloud, edge, attacker, bystander, addresses, log)


def _tls_settings(settings: LoadSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the cloud and its clients need for ``tls://``; nothing for ``tcp://``."""
    if settings.transport != "tls":
        return {}, {}
    key, certificate = (settings.serving.directory / f"cloud.{end}" for end in ("key", "crt"))
    new_certificate(key, certificate, "cloud", ["127.0.0.1"], days=1)
    identity = {"certificate": str(certificate), "key": str(key)}
    return {"tls": identity}, {"tls": {"trust": str(certificate)}}


def _hello(directory: Path) -> bytes:
    """What an edge of the deployment says first, as a frame."""
    manifest = read_manifest(directory / "shards" / "edge")
    hello = Hello(
        role=Role.EDGE,
        software="privatelora-bench load",
        fingerprints=Fingerprints(*manifest.fingerprints),
        codecs=CODEC_NAMES,
        max_frame_nbytes=LinkConfig().max_frame_mib * 2**20,
    )
    return frame(*encode(hello))
