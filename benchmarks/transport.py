"""What a transport costs: round trips of small frames and throughput of large ones.

Method. One process echoes over every transport and over bare echoes (``bare.py``); this process
is the client of one after the other. Each has a processor of its own where there are two. The
contestants take turns for ``rounds`` rounds; in each, every one makes ``round_trips`` round trips
of ``frame_nbytes`` bytes through ``Connection.send`` and ``recv``, after a warm-up, and then sends
large frames while earlier ones come back. p50 and p99 are the median over rounds of each round's;
``vs_bare`` is the median of the ratios of the same round.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from privatelora.benchmarks.bare import EchoClient, connect_pyzmq, connect_uvloop
from privatelora.benchmarks.measure import Spread, machine_facts, paired_ratios
from privatelora.cli._daemons import Daemon
from privatelora.errors import ConfigError
from privatelora.runtime.link_config import CurveConfig, TlsConfig, credentials
from privatelora.runtime.loop import run
from privatelora.transports.base import Connection, Limits
from privatelora.transports.curve_keys import new_curve_key
from privatelora.transports.registry import connect
from privatelora.transports.tls_keys import new_certificate

LISTEN = {
    "tcp": "tcp://127.0.0.1:0",
    "tls": "tls://127.0.0.1:0",
    "zmq+tcp": "zmq+tcp://127.0.0.1:0",
    "zmq+tcp curve": "zmq+tcp://127.0.0.1:0",
    "zmq+ipc": "zmq+ipc://privatelora-bench-{pid}",
    "shm": "shm://privatelora-bench-{pid}",
}
"""Ours, by the name of the row."""

BARE_OF = {
    "tcp": "bare uvloop",
    "tls": "bare uvloop",
    "shm": "bare uvloop",
    "zmq+tcp": "bare pyzmq",
    "zmq+tcp curve": "bare pyzmq",
    "zmq+ipc": "bare pyzmq",
}
"""What each is compared with; without encryption also where ours encrypts."""

LARGE_NBYTES = 8 * 2**20
NUM_LARGE = 12
NUM_LARGE_IN_FLIGHT = 3
WARM_UP_S = 0.05

Report = Callable[[str], None]


@dataclass(frozen=True)
class TransportSettings:
    """One run of the benchmark. ``spin_us`` None: each transport's own choice."""

    transports: tuple[str, ...]
    rounds: int
    round_trips: int
    frame_nbytes: int
    spin_us: int | None
    directory: Path


@dataclass
class _Figures:
    """One contestant's, a value for each round."""

    p50_us: list[float]
    p99_us: list[float]
    large_mib_per_s: list[float]


def measure_transports(settings: TransportSettings, report: Report) -> dict[str, Any]:
    """Measure every transport asked for and the bare echoes they are compared with."""
    unknown = [name for name in settings.transports if name not in LISTEN]
    if unknown:
        raise ConfigError(
            f"no transport {unknown[0]!r} to measure; choose from {', '.join(LISTEN)}"
        )
    processors = sorted(os.sched_getaffinity(0))
    pinned = len(processors) > 1
    config = _write_config(settings, processors[-1] if pinned else None)
    if pinned:
        os.sched_setaffinity(0, {processors[0]})
    try:
        with Daemon("privatelora.benchmarks.echo", config) as server:
            ready = server.read_event("ready")
            figures = run(_measure(settings, ready["addresses"], report))
    finally:
        os.sched_setaffinity(0, processors)
    order = [*settings.transports, *bare_echoes(settings)]
    return {
        "benchmark": "transport",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {
            "rounds": settings.rounds,
            "round_trips": settings.round_trips,
            "frame_nbytes": settings.frame_nbytes,
            "large_frame_nbytes": LARGE_NBYTES,
            "spin_us": settings.spin_us,
            "pinned": pinned,
        },
        "unavailable": ready["unavailable"],
        "rows": [_row(name, figures) for name in order if name in figures],
    }


def bare_echoes(settings: TransportSettings) -> list[str]:
    """Those that the transports asked for are compared with."""
    return sorted({BARE_OF[name] for name in settings.transports})


def _row(name: str, figures: dict[str, _Figures]) -> dict[str, Any]:
    ours = figures[name]
    row: dict[str, Any] = {
        "transport": name,
        "rtt_us_p50": statistics.median(ours.p50_us),
        "rtt_us_p99": statistics.median(ours.p99_us),
        "vs_bare_p50": 1.0,
        "large_mib_per_s": statistics.median(ours.large_mib_per_s),
    }
    if name in BARE_OF:
        bare = figures[BARE_OF[name]]
        rtt = paired_ratios(ours.p50_us, bare.p50_us)
        row |= {
            "bare": BARE_OF[name],
            "vs_bare_p50": rtt.median,
            "vs_bare_p50_spread": rtt._asdict(),
            "large_vs_bare": paired_ratios(ours.large_mib_per_s, bare.large_mib_per_s)._asdict(),
        }
        if "tcp" in figures:
            row["vs_tcp_p50"] = paired_ratios(ours.p50_us, figures["tcp"].p50_us)._asdict()
    return {**row, "p50_us": Spread.of(ours.p50_us)._asdict()}


def _write_config(settings: TransportSettings, processor: int | None) -> Path:
    """Make keys and the echo's settings, which hold what the client needs too."""
    place = settings.directory
    new_curve_key(place / "curve.key", place / "curve.pub")
    new_certificate(place / "tls.key", place / "tls.crt", "bench", ["127.0.0.1"], days=1)
    listeners: dict[str, dict[str, Any]] = {}
    for name in settings.transports:
        listeners[name] = {"address": LISTEN[name].format(pid=os.getpid())}
        if name == "tls":
            listeners[name]["tls"] = {"certificate": "tls.crt", "key": "tls.key"}
        if name.endswith("curve"):
            listeners[name]["curve"] = {"key": "curve.key", "trust": "curve.pub"}
    config = {
        "listeners": listeners,
        "bare": bare_echoes(settings),
        "spin_s": None if settings.spin_us is None else settings.spin_us * 1e-6,
        "processor": processor,
    }
    path = place / "echo.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class _OurClient:
    def __init__(self, connection: Connection) -> None:
        self.send = connection.send
        self._connection = connection

    async def recv(self, nbytes: int, /) -> None:
        frame = await self._connection.recv()
        if len(frame) != nbytes:
            raise RuntimeError(f"an echo of {len(frame)} bytes instead of {nbytes}")


@asynccontextmanager
async def _connect(
    name: str, address: str, settings: TransportSettings
) -> AsyncIterator[EchoClient]:
    if name == "bare uvloop":
        async with connect_uvloop(address) as bare:
            yield bare
    elif name == "bare pyzmq":
        async with connect_pyzmq(address) as bare:
            yield bare
    else:
        place = settings.directory
        limits = Limits(spin_s=None if settings.spin_us is None else settings.spin_us * 1e-6)
        keys = credentials(
            TlsConfig(trust=place / "tls.crt") if name == "tls" else None,
            CurveConfig(key=place / "curve.key", trust=place / "curve.pub")
            if name.endswith("curve")
            else None,
        )
        async with await connect(address, limits, keys) as connection:
            yield _OurClient(connection)


async def _measure(
    settings: TransportSettings, addresses: dict[str, str], report: Report
) -> dict[str, _Figures]:
    figures: dict[str, _Figures] = {name: _Figures([], [], []) for name in addresses}
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(_connect(name, address, settings))
            for name, address in addresses.items()
        }
        for number in range(settings.rounds):
            for name, client in clients.items():
                report(f"round {number + 1} of {settings.rounds}: {name}")
                times = await _round_trips(client, settings)
                figures[name].p50_us.append(times[len(times) // 2])
                figures[name].p99_us.append(times[len(times) * 99 // 100])
                figures[name].large_mib_per_s.append(await _throughput(client))
    return figures


async def _round_trips(client: EchoClient, settings: TransportSettings) -> list[float]:
    """Times of single round trips in microseconds, ascending."""
    frame = os.urandom(settings.frame_nbytes)
    times = []
    end = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < end:
        await client.send(frame)
        await client.recv(len(frame))
    for _ in range(settings.round_trips):
        start = time.perf_counter()
        await client.send(frame)
        await client.recv(len(frame))
        times.append((time.perf_counter() - start) * 1e6)
    return sorted(times)


async def _throughput(client: EchoClient) -> float:
    """MiB/s of large frames each way, while a few are in flight."""
    frame = os.urandom(LARGE_NBYTES)
    free = asyncio.Semaphore(NUM_LARGE_IN_FLIGHT)

    async def send_all() -> None:
        for _ in range(NUM_LARGE):
            await free.acquire()
            await client.send(frame)

    start = time.perf_counter()
    sender = asyncio.create_task(send_all())
    for _ in range(NUM_LARGE):
        await client.recv(len(frame))
        free.release()
    await sender
    return NUM_LARGE * LARGE_NBYTES / 2**20 / (time.perf_counter() - start)
