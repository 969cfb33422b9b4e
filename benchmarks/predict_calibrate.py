"""What this machine takes for the terms of a prediction, measured in some seconds.

Method. A model is split twice into a folder: per layer, and with one exchange for all layers. A
cloud daemon runs for each, and an edge in this process decodes one token at a time with them over
TCP, in fp32 on the wire; and the whole model unsplit, without an adapter. The median of the tokens
is taken, first ones left out. Then

    cloud memory     bytes of all layers' weights / (unsplit token - LM head on its device)
    cloud FLOP/s     operations of a chunk of 64 rows / its time, likewise
    edge memory      bytes of the LM head / its time
    edge FLOP/s      operations of the LM head for 64 rows / its time
    step             token with one exchange - what is predicted of it: messages, event loop,
                     scheduler, choosing the rows; half of it for each end
    exchange         (token per layer - what is predicted of it) / exchange points, likewise
    emulation        (token per layer over an emulated link without delay - that without one) /
                     round trips
    waking           the same two over an emulated FAR_S - what is predicted of them: after a wait
                     cores sleep, and caches hold other things
    codecs           writing and reading rows of two widths: fixed, and for each number

Fixed times of a layer are in its bandwidth, so figures hold for models of about this size. The two
ends never compute at once here, so nothing in these figures hides behind anything. The socket's own
round trip, ``predict_choose.TRANSPORTS``, is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from privatelora.benchmarks.predict import step_nbytes, token_time
from privatelora.benchmarks.predict_choose import transport_round_trip_s
from privatelora.benchmarks.predict_hardware import LONG_WAIT_S, CodecCost, Hardware, Link
from privatelora.benchmarks.predict_shapes import ModelShape
from privatelora.benchmarks.predict_terms import Scenario, step_terms
from privatelora.benchmarks.predict_timing import (
    CHUNK,
    chunk_s,
    codec_costs,
    default_codec_names,
    head_s,
    token_s,
)
from privatelora.benchmarks.serve import write_settings
from privatelora.benchmarks.shards import split_with_adapter
from privatelora.cli._daemons import Daemon
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.plan import Plan
from privatelora.partition.shard import open_shard
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.config import EdgeConfig
from privatelora.runtime.device import compute_device
from privatelora.runtime.edge import Edge
from privatelora.runtime.language_model import Ends
from privatelora.runtime.link_config import ImpairedConfig, ImpairmentConfig, PayloadConfig
from privatelora.runtime.loop import run
from privatelora.runtime.unsplit import open_unsplit

FP32 = Codecs("fp32", "fp32", "fp32", "fp32")
NUM_PASSES = 10
FAR_S = 2 * LONG_WAIT_S
"""The round trip over which waking is measured."""
TCP_S = transport_round_trip_s("tcp")

Report = Callable[[str], None]


@dataclass(frozen=True)
class CalibrateSettings:
    """``directory``: an empty folder for the shards, about twice the model in ``dtype``.

    ``num_threads``: of the tensor work of either end; None leaves it as it is. ``tokens``: timed
    in each measurement. ``device``: of the cloud; the edge is on the CPU.
    """

    model: str
    directory: Path
    dtype: str = "bfloat16"
    num_threads: int | None = None
    tokens: int = 24
    device: str = "cpu"


@dataclass(frozen=True)
class Calibration:
    """The ends as predictions take them, and what was measured for that, in seconds.

    ``emulation_s``: what an emulated link takes for a round trip besides what it is set to.
    """

    shape: ModelShape
    cloud: Hardware
    edge: Hardware
    emulation_s: float
    measured: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Everything, with times in milliseconds."""
        return {
            "model": self.shape.name,
            "cloud": self.cloud.as_json(),
            "edge": self.edge.as_json(),
            "emulation_ms": self.emulation_s * 1e3,
            "measured_ms": {name: seconds * 1e3 for name, seconds in self.measured.items()},
        }


def calibrate(settings: CalibrateSettings, report: Report) -> Calibration:
    """Measure this machine with a model; raises PartitionError, ConfigError or PrivateLoRAError."""
    with ExitStack() as stack:
        return Calibrator(settings, stack, report).measure(report)


class Calibrator:
    """A model split in both ways with its daemons running, to be measured as often as wanted."""

    def __init__(self, settings: CalibrateSettings, stack: ExitStack, report: Report) -> None:
        """Start it all, until ``stack`` closes; raises as ``calibrate`` does."""
        self._settings = settings
        devices = [compute_device(name) for name in ("cpu", settings.device)]
        report("splitting the model")
        dtype: torch.dtype = getattr(torch, settings.dtype)
        with open_checkpoint(settings.model) as checkpoint:
            self.shape = ModelShape(settings.model, checkpoint.config, dtype.itemsize)
            self._plans = (self.shape.plan(), self.shape.plan("all"))
            for number, plan in enumerate(self._plans):
                place = self._place(number)
                split_with_adapter(checkpoint, plan, place, place / "adapter.safetensors", dtype)
        shard = open_shard(self._place(0) / "edge", "edge")
        ends = {on: Ends(self.shape.config, shard.load(on, dtype)) for on in set(devices)}
        self._edge_ends, self._cloud_ends = (ends[on] for on in devices)
        self._base = open_unsplit(str(self._place(0)), device=settings.device).model
        report("starting daemons")
        clouds = [stack.enter_context(self._cloud(number)) for number in range(2)]
        self._addresses = [cloud.read_address() for cloud in clouds]

    def measure(self, report: Report) -> Calibration:
        """This machine as it is now."""
        tokens = self._settings.tokens
        with _threads(self._settings.num_threads), torch.inference_mode():
            report("measuring the LM head and codecs")
            width = self.shape.config.hidden_size
            measured = {
                "lm_head": head_s(self._edge_ends, width),
                "lm_head_chunk": head_s(self._edge_ends, width, CHUNK),
                "cloud_lm_head": head_s(self._cloud_ends, width),
            }
            codecs = codec_costs(default_codec_names())
            report("decoding unsplit")
            measured["unsplit_token"] = run(token_s(self._base, tokens))
            measured["unsplit_chunk"] = run(chunk_s(self._base))
            report("decoding split")
            measured["split_token"] = run(self._split_token_s(0, tokens))
            measured["grouped_token"] = run(self._split_token_s(1, tokens))
            report("decoding over an emulated link")
            measured["emulated_token"] = run(self._split_token_s(0, tokens, 0.0))
            measured["far_token"] = run(self._split_token_s(0, max(4, tokens // 3), FAR_S))
            measured["far_grouped_token"] = run(self._split_token_s(1, tokens, FAR_S))
        return calibration(self.shape, self._plans, measured, codecs)

    def _place(self, number: int) -> Path:
        return self._settings.directory / f"shards-{number}"

    def _cloud(self, number: int) -> Daemon:
        place = self._place(number)
        values: dict[str, Any] = {
            "listen": "tcp://127.0.0.1:0",
            "shard": str(place / "cloud"),
            "device": self._settings.device,
        }
        if self._settings.num_threads is not None:
            values["num_threads"] = self._settings.num_threads
        return Daemon("privatelora.cli.serve", write_settings(place / "cloud.yaml", values))

    async def _split_token_s(
        self, number: int, tokens: int, emulated_s: float | None = None
    ) -> float:
        """Median seconds for a token; ``emulated_s``: a round trip, None for no emulated link."""
        impaired = None
        if emulated_s is not None:
            way = ImpairmentConfig(delay_ms=emulated_s * 1e3 / 2)
            impaired = ImpairedConfig(up=way, down=way)
        edge = Edge(
            EdgeConfig(
                cloud=self._addresses[number],
                shard=self._place(number) / "edge",
                adapter=self._place(number) / "adapter.safetensors",
                payload=PayloadConfig.model_validate("fp32"),
                impaired=impaired,
            )
        )
        try:
            await edge.connect()
            return await token_s(edge.model, tokens)
        finally:
            await edge.aclose()


def calibration(
    shape: ModelShape,
    plans: tuple[Plan, Plan],
    measured: dict[str, float],
    codecs: dict[str, CodecCost],
) -> Calibration:
    """What was ``measured`` with the plans, per layer and grouped to one, as terms."""
    per_layer, grouped = plans
    layers_s = max(measured["unsplit_token"] - measured["cloud_lm_head"], 1e-6)
    chunk_s = max(measured["unsplit_chunk"] - measured["cloud_lm_head"], layers_s)
    weights = shape.config.num_layers * shape.layer_weights
    flops_per_s = 2 * weights * CHUNK / chunk_s
    cloud = Hardware("here", weights * shape.weight_nbytes / layers_s, flops_per_s, codecs=codecs)
    edge_memory = shape.head_weights * shape.weight_nbytes / measured["lm_head"]
    edge_flops_per_s = 2 * shape.head_weights * CHUNK / measured["lm_head_chunk"]
    edge = Hardware("here", edge_memory, edge_flops_per_s, codecs=codecs)

    num_points = len(per_layer.wire_points)
    round_trips = 1 + num_points
    emulation_s = max(0.0, measured["emulated_token"] - measured["split_token"]) / round_trips

    def more_s(name: str, plan: Plan, rtt_s: float = 0.0) -> float:
        """By how much what was measured is above what is predicted so far."""
        scenario = Scenario(shape, plan, FP32, Link(TCP_S + rtt_s), cloud, edge)
        known = token_time(step_terms(scenario), step_nbytes(scenario), scenario.link)
        return measured[name] - known.total_s

    step_s = exchange_s = step_wake_s = exchange_wake_s = 0.0
    each = max(1, num_points)
    far_s = FAR_S + emulation_s
    for _ in range(NUM_PASSES):  # each has a little of the others in it
        step_s = max(0.0, step_s + more_s("grouped_token", grouped))
        exchange_s = max(0.0, exchange_s + more_s("split_token", per_layer) / each)
        more = more_s("far_grouped_token", grouped, far_s)
        step_wake_s = max(0.0, step_wake_s + more)
        more = more_s("far_token", per_layer, far_s) - more
        exchange_wake_s = max(0.0, exchange_wake_s + more / each)
        cloud, edge = (
            replace(
                end,
                step_s=step_s / 2,
                exchange_s=exchange_s / 2,
                step_wake_s=step_wake_s / 2,
                exchange_wake_s=exchange_wake_s / 2,
            )
            for end in (cloud, edge)
        )
    return Calibration(shape, cloud, edge, emulation_s, measured)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
