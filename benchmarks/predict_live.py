"""The link and the cloud of an edge's file, measured over the link itself.

Method. A connection as the edge's own, but for the codecs. The round trip is the quickest of some
pings. Tokens of the base model are decoded; what is left of the quickest after round trips, bytes
and what the edge takes is the cloud's, no more exactly than the pings vary, times the round trips.
Bandwidth: the same chunk of a prompt in a few bits and, one direction at a time, in fp32, in turns:
bytes more over seconds more, each the quickest. Where those seconds are less than what chunks vary
by anyway, the bandwidth does not limit anything.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from privatelora.benchmarks.predict import step_nbytes, token_time
from privatelora.benchmarks.predict_choose import transport_round_trip_s
from privatelora.benchmarks.predict_hardware import Hardware, Link
from privatelora.benchmarks.predict_shapes import ModelShape
from privatelora.benchmarks.predict_terms import Scenario, cloud_adapter_weights, step_terms
from privatelora.benchmarks.predict_timing import (
    codec_costs,
    default_codec_names,
    head_s,
    token_times_s,
)
from privatelora.errors import ConnectError, TransportError
from privatelora.partition.plan import Plan
from privatelora.partition.shard import open_shard
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.config import EdgeConfig
from privatelora.runtime.device import compute_dtype
from privatelora.runtime.edge import link_settings
from privatelora.runtime.link_config import DownConfig, PayloadConfig, UpConfig
from privatelora.runtime.split_model import CloudAccess, EdgeParts, SplitModel
from privatelora.runtime.wire.messages import Fingerprints
from privatelora.transports.address import parse_address

NUM_PINGS = 12
NUM_TOKENS = 12
NUM_CHUNKS = 5
MORE_NBYTES = 128 * 1024
"""By which chunks should differ, so that a bandwidth can be told from them."""
CHUNK_ROWS = (16, 128)
"""At least and at most."""
HANDLING_S = 100e-6
"""Of an exchange at one end, besides numbers and network: it cannot be told from a cloud's layers
at a distance. About what `predict_calibrate` finds on a quiet core."""
MIN_CLOUD_S = 1e-4

Report = Callable[[str], None]


@dataclass(frozen=True)
class LiveMeasurement:
    """Seconds. ``link``: of the network alone, that of the transport taken off."""

    shape: ModelShape
    plan: Plan
    link: Link
    cloud: Hardware
    edge: Hardware
    ping_s: float
    token_s: float
    cloud_token_s: float
    uncertain_s: float
    """How far ``cloud_token_s`` may be off."""

    def as_json(self) -> dict[str, Any]:
        """Milliseconds."""
        return {
            "ping_ms": self.ping_s * 1e3,
            "token_ms": self.token_s * 1e3,
            "cloud_token_ms": self.cloud_token_s * 1e3,
            "cloud_token_uncertain_ms": self.uncertain_s * 1e3,
        }


async def measure_live(config: EdgeConfig, report: Report) -> LiveMeasurement:
    """Measure with the cloud that ``config`` names.

    Raises ConnectError if it is not there, and whatever else connecting raises.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    shard = open_shard(config.shard, "edge")
    manifest = shard.manifest
    dtype = compute_dtype(config.dtype, manifest.dtype)
    device = torch.device("cpu")
    parts = EdgeParts(manifest.config, manifest.plan, shard.load(device, dtype), device, dtype)
    shape = ModelShape(str(config.shard), manifest.config, dtype.itemsize)
    fingerprints = Fingerprints(*manifest.fingerprints)

    @asynccontextmanager
    async def connected(payload: PayloadConfig) -> AsyncIterator[CloudAccess]:
        settings = link_settings(config, payload)
        access = CloudAccess(parts, fingerprints, settings, config.max_positions, CHUNK_ROWS[1])
        try:
            await access.link()
            yield access
        except TransportError as error:
            raise ConnectError(
                f"{error}; without a cloud, name the link: --link 20ms,60/100mbps"
            ) from error
        finally:
            await access.aclose()

    report("the edge's own part")
    edge = _edge(shape, parts)
    async with connected(PayloadConfig.model_validate("fp32")) as access:
        report("round trips")
        link = await access.link()
        pings = [await link.ping() for _ in range(NUM_PINGS)]
        report("decoding")
        times = await token_times_s(SplitModel(parts, access, None), NUM_TOKENS)
    report("bandwidth")
    few, many = "int4", "fp32"
    wanted = ((few, few), (many, few), (few, many))
    rows = _chunk_rows(shape, manifest.plan, few, many)
    chunks: dict[tuple[str, str], list[float]] = {codecs: [] for codecs in wanted}
    async with AsyncExitStack() as connections:
        models = {}
        for up, down in wanted:
            payload = PayloadConfig(
                up=UpConfig.model_validate(up), down=DownConfig.model_validate(down)
            )
            access = await connections.enter_async_context(connected(payload))
            models[up, down] = SplitModel(parts, access, None)
            rows = min(rows, access.max_step_positions, access.max_positions)
        for _ in range(NUM_CHUNKS):
            for codecs, model in models.items():
                chunks[codecs].append(await _chunk_s(model, rows))

    def bandwidth(up: str, down: str) -> float:
        slow, quick = chunks[up, down], chunks[few, few]
        if min(slow) <= sorted(quick)[-2]:  # one of them may have had bad luck
            return math.inf
        more = _chunk_bits(shape, manifest.plan, up, down, rows)
        more -= _chunk_bits(shape, manifest.plan, few, few, rows)
        return more / (min(slow) - min(quick))

    ping_s, token_s = min(pings), min(times)
    seen = Link(ping_s, bandwidth(many, few), bandwidth(few, many))
    free = Hardware("the cloud of the file", math.inf, math.inf, exchange_s=HANDLING_S)
    scenario = Scenario(
        shape, manifest.plan, Codecs(many, many, many, many), seen, cloud=free, edge=edge
    )
    known_s = token_time(step_terms(scenario), step_nbytes(scenario), seen).total_s
    weights = len(manifest.plan.cloud_layers) * shape.layer_weights
    weights += cloud_adapter_weights(shape, manifest.plan)
    num_points = len(manifest.plan.wire_points)
    cloud_token_s = cloud_seconds(
        max(token_s - known_s, MIN_CLOUD_S), num_points, shape.qkv_weights / weights, ping_s
    )
    # A chunk is bound by arithmetic or, where it takes no longer than a token, by memory as well.
    chunk_s = max(min(chunks[few, few]) - known_s, cloud_token_s)
    cloud = replace(
        free,
        memory_bytes_per_s=weights * shape.weight_nbytes / cloud_token_s,
        flops_per_s=2 * weights * rows / chunk_s,
        codecs=edge.codecs,
    )
    transport_s = transport_round_trip_s(parse_address(config.cloud).scheme)
    return LiveMeasurement(
        shape,
        manifest.plan,
        replace(seen, rtt_s=max(0.0, ping_s - transport_s)),
        cloud,
        edge,
        ping_s,
        token_s,
        cloud_token_s,
        step_nbytes(scenario).round_trips * (statistics.median(pings) - ping_s),
    )


def cloud_seconds(seen_s: float, num_points: int, share: float, wait_s: float) -> float:
    """What a cloud computes for a token of which ``seen_s`` could be seen from the edge.

    The rest it computes at ``num_points``, while it waits ``wait_s`` at each: up to ``share`` of
    everything each time.
    """
    all_hidden_s = seen_s / max(1 - num_points * share, 1e-9)
    return min(all_hidden_s, seen_s + num_points * wait_s)


def _edge(shape: ModelShape, parts: EdgeParts) -> Hardware:
    seconds = head_s(parts.ends, shape.config.hidden_size)
    return Hardware(
        "this device",
        shape.head_weights * shape.weight_nbytes / seconds,
        math.inf,
        exchange_s=HANDLING_S,
        codecs=codec_costs(default_codec_names()),
    )


async def _chunk_s(model: SplitModel, rows: int) -> float:
    sequence = await model.open_sequence(rows)
    try:
        started = time.perf_counter()
        await sequence.forward([1] * rows, 0, "last")
        return time.perf_counter() - started
    finally:
        await sequence.aclose()


def _chunk_rows(shape: ModelShape, plan: Plan, few: str, many: str) -> int:
    """So many that a chunk in ``many`` bits upward is MORE_NBYTES larger than in ``few``."""
    more = _chunk_bits(shape, plan, many, few, 1) - _chunk_bits(shape, plan, few, few, 1)
    least, most = CHUNK_ROWS
    return max(least, min(most, math.ceil(8 * MORE_NBYTES / more)))


def _chunk_bits(shape: ModelShape, plan: Plan, up: str, down: str, rows: int) -> float:
    free = Hardware("", 1.0, 1.0)
    scenario = Scenario(shape, plan, Codecs(up, up, down, down), Link(), cloud=free, edge=free)
    nbytes = step_nbytes(scenario, rows)
    return 8 * (nbytes.up + nbytes.down)
