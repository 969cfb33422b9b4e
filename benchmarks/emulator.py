"""Whether an impaired connection is what it is set to: delay and bandwidth, measured.

Method. Another process echoes over TCP on the loopback interface; this end wraps its connection
in ``impaired``. For every round trip time half of it is set in each direction, and round trips of
small frames are timed. For every bandwidth it is set in one direction, the other is unlimited,
and frames are sent for a second or two, the time running from the first echo to the last.
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

from privatelora.benchmarks.measure import machine_facts
from privatelora.cli._daemons import Daemon
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
        "machine": machine_facts(),
        "frame_nbytes": SMALL_NBYTES,
        "rtt_rows": rtts,
        "bandwidth_rows": bandwidths,
    }


async def _measure(
    settings: EmulatorSettings, address: str, report: Report
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rtts = []
    for rtt_ms in settings.rtts_ms:
        report(f"round trips of {rtt_ms:g} ms")
        half = Impairment(delay_ms=rtt_ms / 2)
        times = await _round_trips(await _connect(address, half, half))
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
            measured = await _bandwidth(await _connect(address, up, down), mbps)
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


async def _round_trips(connection: Connection) -> list[float]:
    """Times in milliseconds, ascending."""
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


async def _bandwidth(connection: Connection, mbps: float) -> float:
    """Million bits of payload per second that came back."""
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
