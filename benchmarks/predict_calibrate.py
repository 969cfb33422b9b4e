"""What this machine takes for the terms of a prediction, measured in some seconds.

Method. A model is split per layer into a folder, and decoded one token at a time: unsplit without
an adapter, and split with cloud and edge in this process over ``inproc``, in fp32 on the wire. The
median of the tokens is taken, first ones left out. Then

    cloud memory     bytes of all layers' weights / (unsplit token - LM head)
    cloud FLOP/s     operations of a chunk of 64 rows / its time, likewise
    edge memory      bytes of the LM head / its time; the operations per second are the cloud's
    handling         (split token - unsplit token - A, B and M as predicted - codecs) / round trips,
                     half of it for each end: messages, event loop, scheduler
    codecs           writing and reading rows of two widths: fixed, and for each number

Fixed times of a layer are in its bandwidth, so figures hold for models of about this size. The two
ends never compute at once here, so nothing in these figures hides behind anything. A socket's own
round trip is not in them: ``predict_choose.TRANSPORTS`` has it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from privatelora.benchmarks.predict import step_nbytes
from privatelora.benchmarks.predict_hardware import CodecCost, Hardware, Link
from privatelora.benchmarks.predict_shapes import ModelShape
from privatelora.benchmarks.predict_terms import Scenario, step_terms
from privatelora.benchmarks.shards import split_with_adapter
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.manifest import Manifest
from privatelora.partition.plan import Plan
from privatelora.partition.shard import open_shard
from privatelora.runtime.cloud import Cloud
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.config import CloudConfig, EdgeConfig
from privatelora.runtime.edge import Edge
from privatelora.runtime.language_model import Ends, LanguageModel
from privatelora.runtime.link_config import PayloadConfig
from privatelora.runtime.loop import run
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.unsplit import open_unsplit

ADDRESS = "inproc://privatelora-calibrate"
CHUNK = 64
NUM_SKIPPED = 4
NUM_REPEATS = 24
WIDTHS = (128, 2048)
"""Of the rows that codecs are measured with: about one exchange, and hidden states."""
FP32 = Codecs("fp32", "fp32", "fp32", "fp32")

Report = Callable[[str], None]


@dataclass(frozen=True)
class CalibrateSettings:
    """``directory``: an empty folder for the shards, about as large as the model in ``dtype``.

    ``num_threads``: of the tensor work of either end; None leaves it as it is.
    """

    model: str
    directory: Path
    dtype: str = "bfloat16"
    num_threads: int | None = None
    tokens: int = 24


@dataclass(frozen=True)
class Calibration:
    """The ends as predictions take them, and what was measured for that, in seconds."""

    shape: ModelShape
    cloud: Hardware
    edge: Hardware
    measured: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Everything, with times in milliseconds."""
        return {
            "model": self.shape.name,
            "cloud": self.cloud.as_json(),
            "edge": self.edge.as_json(),
            "measured_ms": {name: seconds * 1e3 for name, seconds in self.measured.items()},
        }


def calibrate(settings: CalibrateSettings, report: Report) -> Calibration:
    """Measure this machine with a model; raises PartitionError or ConfigError."""
    report("splitting the model")
    manifest = _split(settings)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    shape = ModelShape(settings.model, manifest.config, dtype.itemsize)
    with _threads(settings.num_threads), torch.inference_mode():
        report("measuring the LM head and codecs")
        edge = open_shard(settings.directory / "shards/edge", "edge")
        ends = Ends(manifest.config, edge.load(torch.device("cpu"), dtype))
        lm_head_s = head_s(ends, manifest.config.hidden_size)
        codecs = codec_costs(default_codec_names())
        measured = run(_decode(settings, manifest, report))
    return _calibration(shape, manifest.plan, {"lm_head": lm_head_s, **measured}, codecs)


def _calibration(
    shape: ModelShape, plan: Plan, measured: dict[str, float], codecs: dict[str, CodecCost]
) -> Calibration:
    layers_s = max(measured["unsplit_token"] - measured["lm_head"], 1e-6)
    chunk_s = max(measured["unsplit_chunk"] - measured["lm_head"], layers_s)
    weights = shape.config.num_layers * shape.layer_weights
    flops_per_s = 2 * weights * CHUNK / chunk_s
    cloud = Hardware("here", weights * shape.weight_nbytes / layers_s, flops_per_s, codecs=codecs)
    edge_memory = shape.head_weights * shape.weight_nbytes / measured["lm_head"]
    edge = Hardware("here", edge_memory, flops_per_s, codecs=codecs)
    scenario = Scenario(shape, plan, FP32, Link(), cloud, edge)
    terms = step_terms(scenario)
    known_s = terms.cloud_s + terms.exchange_s + terms.codec_s + terms.lm_head_s
    round_trips = step_nbytes(scenario).round_trips
    handling_s = max(0.0, measured["split_token"] - known_s) / round_trips
    half_s = handling_s / 2
    return Calibration(
        shape,
        replace(cloud, exchange_s=half_s, step_s=half_s),
        replace(edge, exchange_s=half_s, step_s=half_s),
        {**measured, "handling_of_a_round_trip": handling_s},
    )


def default_codec_names() -> set[str]:
    """Codecs that predictions compare: those of the settings' default, fp16 and fp32."""
    return {*astuple(default_codecs()), "fp16", "fp32"}


def default_codecs() -> Codecs:
    """What an edge asks for that sets no ``payload``."""
    return Codecs(*(names[0] for names in astuple(PayloadConfig().preferences())))


def codec_costs(names: Iterable[str]) -> dict[str, CodecCost]:
    """Of each codec, half of writing and reading a row: what one end takes."""
    costs = {}
    for name in sorted(names):
        narrow, wide = (_codec_s(name, width) / 2 for width in WIDTHS)
        number_s = max(0.0, (wide - narrow) / (WIDTHS[1] - WIDTHS[0]))
        costs[name] = CodecCost(max(0.0, narrow - WIDTHS[0] * number_s), number_s)
    return costs


def _codec_s(name: str, width: int) -> float:
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    return _median_s(lambda: unpack(pack(row, name), device, torch.float32), 100)


def head_s(ends: Ends, hidden_size: int) -> float:
    """Median seconds for the final norm and the LM head of one row."""
    row = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(0))
    return _median_s(lambda: ends.logits(row), NUM_REPEATS)


def _median_s(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(NUM_SKIPPED + repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[NUM_SKIPPED:])


def _split(settings: CalibrateSettings) -> Manifest:
    with open_checkpoint(settings.model) as checkpoint:
        plan = ModelShape(settings.model, checkpoint.config).plan()
        dtype: torch.dtype = getattr(torch, settings.dtype)
        adapter_file = settings.directory / "adapter.safetensors"
        return split_with_adapter(
            checkpoint, plan, settings.directory / "shards", adapter_file, dtype
        )


async def _decode(
    settings: CalibrateSettings, manifest: Manifest, report: Report
) -> dict[str, float]:
    place, tokens = settings.directory / "shards", settings.tokens
    report("decoding unsplit")
    base = open_unsplit(str(place)).model
    unsplit_s, chunk_s = await token_s(base, tokens), await _chunk_s(base)
    report("decoding split")
    cloud = Cloud(CloudConfig(listen=ADDRESS, shard=place / "cloud"))
    async with await cloud.listen():
        edge = Edge(
            EdgeConfig(
                cloud=ADDRESS,
                shard=place / "edge",
                adapter=settings.directory / "adapter.safetensors",
                payload=PayloadConfig.model_validate("fp32"),
            )
        )
        try:
            split_s = await token_s(edge.model, tokens)
        finally:
            await edge.aclose()
    return {"unsplit_token": unsplit_s, "unsplit_chunk": chunk_s, "split_token": split_s}


async def token_s(model: LanguageModel, tokens: int) -> float:
    """Median seconds for one decoded token."""
    return statistics.median(await token_times_s(model, tokens))


async def token_times_s(model: LanguageModel, tokens: int) -> list[float]:
    """Seconds for each of ``tokens`` decoded one after the other, first ones left out."""
    sequence = await model.open_sequence(NUM_SKIPPED + tokens)
    times = []
    try:
        for position in range(NUM_SKIPPED + tokens):
            started = time.perf_counter()
            await sequence.forward([1 + position], position, "last")
            times.append(time.perf_counter() - started)
    finally:
        await sequence.aclose()
    return times[NUM_SKIPPED:]


async def _chunk_s(model: LanguageModel) -> float:
    """Median seconds for a chunk of CHUNK positions, with the logits of the last."""
    sequence = await model.open_sequence(CHUNK)
    times = []
    try:
        for _ in range(4):
            started = time.perf_counter()
            await sequence.forward(list(range(1, CHUNK + 1)), 0, "last")
            times.append(time.perf_counter() - started)
    finally:
        await sequence.aclose()
    return statistics.median(times[1:])


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
