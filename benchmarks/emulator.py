"""Whether an impaired connection is what it is set to: delay and bandwidth, measured.

Method. Another process echoes over TCP on the loopback interface; this end wraps its connection
in ``impaired``. For every round trip time half of it is set in each direction, and round trips of
small frames are timed. For every bandwidth it is set in one direction, the other is unlimited,
and frames are sent for a second or two, the time running from the first echo to the last.

With ``kernel`` the same is measured once more with nothing emulated, over a link between two
network namespaces that the kernel shapes (``kernel_link.py``). What this kernel cannot do is said.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from privatelora.benchmarks.kernel_link import (
    FAR_ADDRESS,
    PAYLOAD_SHARE,
    KernelLink,
    kernel_link,
)
from privatelora.benchmarks.measure import machine_facts
from privatelora.cli._daemons import Daemon
from privatelora.errors import ConfigError
from privatelora.runtime.loop import run
from privatelora.transports.base import Connection, Limits
from privatelora.transports.emulated_link import Impairment
from privatelora.transports.impaired import impaired
from privatelora.transports.registry import connect

SMALL_NBYTES = 768
ROUND_TRIPS_S = 2.0
TRANSFER_S = 1.5
MIN_FRAMES = 24

Report = Callable[[str], None]


@dataclass(frozen=True)
class EmulatorSettings:
    """One run of the benchmark; ConfigError for what cannot be emulated."""

    rtts_ms: tuple[float, ...]
    bandwidths_mbps: tuple[float, ...]
    directory: Path
    kernel: bool = False

    def __post_init__(self) -> None:
        for rtt_ms in self.rtts_ms:
            Impairment(delay_ms=rtt_ms / 2)
        for mbps in self.bandwidths_mbps:
            Impairment(bandwidth_mbps=mbps)


def measure_emulator(settings: EmulatorSettings, report: Report) -> dict[str, Any]:
    """Measure every round trip time and every bandwidth, the latter in both directions."""
    config = settings.directory / "echo.yaml"
    listeners = {"tcp": {"address": "tcp://127.0.0.1:0"}}
    config.write_text(
        yaml.safe_dump({"listeners": listeners, "bare": [], "spin_s": None, "processor": None})
    )
    with Daemon("privatelora.benchmarks.echo", config) as server:
        address = server.read_event("ready")["addresses"]["tcp"]
        rtts, bandwidths = run(_measure(settings, address, report))
    return {
        "benchmark": "emulator",
        "method": __doc__,
        "machine": machine_facts(),
        "frame_nbytes": SMALL_NBYTES,
        "rtt_rows": rtts,
        "bandwidth_rows": bandwidths,
        **(_measure_kernel(settings, report) if settings.kernel else {}),
    }


def _measure_kernel(settings: EmulatorSettings, report: Report) -> dict[str, Any]:
    """The same settings over links that the kernel shapes; what cannot be had by why."""
    missing: dict[str, str] = {}
    rtts, bandwidths = [], []
    try:
        for rtt_ms in filter(None, settings.rtts_ms):
            report(f"the kernel's round trips of {rtt_ms:g} ms")
            with kernel_link(delay_ms=rtt_ms / 2) as link:
                measured = _over(link, settings, 0)["rtt_ms"]
            rtts.append({"set_rtt_ms": rtt_ms, "kernel_rtt_ms": measured})
    except ConfigError as error:
        missing["round trips"] = str(error)
    try:
        for mbps in settings.bandwidths_mbps:
            report(f"the kernel's {mbps:g} Mbps")
            with kernel_link(mbps=mbps) as link:
                measured = _over(link, settings, mbps)["mbps"]
            bandwidths.append(
                {
                    "set_mbps": mbps,
                    "kernel_mbps": measured,
                    "kernel_ratio": measured / (mbps * PAYLOAD_SHARE),
                }
            )
    except ConfigError as error:
        missing["bandwidth"] = str(error)
    return {
        "kernel_rtt_rows": rtts,
        "kernel_bandwidth_rows": bandwidths,
        "missing": missing,
    }


def _over(link: KernelLink, settings: EmulatorSettings, mbps: float) -> dict[str, float]:
    """Measure from one end of a link to the other."""
    config = settings.directory / "kernel-echo.yaml"
    listeners = {"tcp": {"address": f"tcp://{FAR_ADDRESS}:0"}}
    config.write_text(
        yaml.safe_dump({"listeners": listeners, "bare": [], "spin_s": None, "processor": None})
    )
    with Daemon("privatelora.benchmarks.echo", config, within=link.far) as server:
        address = server.read_event("ready")["addresses"]["tcp"]
        with Daemon(
            "privatelora.benchmarks.kernel_client", address, str(mbps), within=link.near
        ) as client:
            return client.read_event("measured")


async def _measure(
    settings: EmulatorSettings, address: str, report: Report
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rtts = []
    for rtt_ms in settings.rtts_ms:
        report(f"round trips of {rtt_ms:g} ms")
        half = Impairment(delay_ms=rtt_ms / 2)
        times = await round_trips(await _connect(address, half, half))
        rtts.append(
            {
                "set_rtt_ms": rtt_ms,
                "rtt_ms_p50": times[len(times) // 2],
                "rtt_ms_p99": times[len(times) * 99 // 100],
                "round_trips": len(times),
            }
        )
    bandwidths = []
    for mbps in settings.bandwidths_mbps:
        for direction in ("up", "down"):
            report(f"{mbps:g} Mbps {direction}")
            slow, free = Impairment(bandwidth_mbps=mbps), Impairment()
            up, down = (slow, free) if direction == "up" else (free, slow)
            measured = await bandwidth(await _connect(address, up, down), mbps)
            bandwidths.append(
                {
                    "set_mbps": mbps,
                    "direction": direction,
                    "mbps": measured,
                    "ratio": measured / mbps,
                }
            )
    return rtts, bandwidths


async def _connect(address: str, up: Impairment, down: Impairment) -> Connection:
    limits = Limits(spin_s=0)
    return impaired(await connect(address, limits), limits, send=up, receive=down, seed=1)


async def round_trips(connection: Connection) -> list[float]:
    """Times of small frames in milliseconds, ascending; closes the connection."""
    frame = os.urandom(SMALL_NBYTES)
    times: list[float] = []
    end = time.perf_counter() + ROUND_TRIPS_S
    async with connection:
        while len(times) < MIN_FRAMES or time.perf_counter() < end:
            start = time.perf_counter()
            await connection.send(frame)
            await connection.recv()
            times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)


async def bandwidth(connection: Connection, mbps: float) -> float:
    """Million bits of payload per second that came back; closes the connection."""
    total_nbytes = mbps * 1e6 / 8 * TRANSFER_S
    frame = os.urandom(max(256, min(256 * 1024, int(total_nbytes / MIN_FRAMES))))
    count = max(MIN_FRAMES, int(total_nbytes / len(frame)))

    async def send_all() -> None:
        for _ in range(count):
            await connection.send(frame)

    async with connection, asyncio.TaskGroup() as group:
        group.create_task(send_all())
        await connection.recv()
        start = time.perf_counter()
        for _ in range(count - 1):
            await connection.recv()
        elapsed = time.perf_counter() - start
    return (count - 1) * len(frame) * 8 / 1e6 / elapsed
