"""How long single parts of a token take in this process: what calibrations are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple

import torch

from privatelora.benchmarks.predict_hardware import CodecCost
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.language_model import Ends, LanguageModel
from privatelora.runtime.link_config import PayloadConfig
from privatelora.runtime.tensors import pack, unpack

CHUNK = 64
"""Positions of a prompt that are timed together."""
NUM_SKIPPED = 4
NUM_REPEATS = 24
WIDTHS = (128, 2048)
"""Of the rows that codecs are measured with: about one exchange, and hidden states."""
LAYER_NBYTES = 8 * 2**20
"""Read before a codec is timed, as a layer's weights would be: what a core's own caches hold of the
codec is gone by then."""


def default_codec_names() -> set[str]:
    """Codecs that predictions compare: those of the settings' default, fp16 and fp32."""
    return {*astuple(default_codecs()), "fp16", "fp32"}


def default_codecs() -> Codecs:
    """What an edge asks for that sets no ``payload``."""
    return Codecs(*(names[0] for names in astuple(PayloadConfig().preferences())))


def codec_costs(names: Iterable[str]) -> dict[str, CodecCost]:
    """Of each codec, half of writing and reading a row: what one end takes."""
    costs = {}
    layer = torch.ones(LAYER_NBYTES // 4)
    for name in sorted(names):
        narrow, wide = (_codec_s(name, width, layer) / 2 for width in WIDTHS)
        number_s = max(0.0, (wide - narrow) / (WIDTHS[1] - WIDTHS[0]))
        costs[name] = CodecCost(max(0.0, narrow - WIDTHS[0] * number_s), number_s)
    return costs


def _codec_s(name: str, width: int, layer: torch.Tensor) -> float:
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    return _median_s(lambda: unpack(pack(row, name), device, torch.float32), before=layer.sum)


def head_s(ends: Ends, hidden_size: int, num_rows: int = 1) -> float:
    """Median seconds for the final norm and the LM head, until the logits are on the CPU."""
    rows = torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(0))
    there = rows.to(ends.lm_head.device)
    return _median_s(lambda: ends.logits(there).cpu())


def _median_s(work: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    times = []
    for _ in range(NUM_SKIPPED + NUM_REPEATS):
        if before is not None:
            before()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[NUM_SKIPPED:])


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
            # A GPU is done when its result is here.
            (await sequence.forward([1 + position], position, "last")).cpu()
            times.append(time.perf_counter() - started)
    finally:
        await sequence.aclose()
    return times[NUM_SKIPPED:]


async def chunk_s(model: LanguageModel) -> float:
    """Median seconds for a chunk of CHUNK positions, with the logits of the last."""
    sequence = await model.open_sequence(CHUNK)
    times = []
    try:
        for _ in range(4):
            started = time.perf_counter()
            (await sequence.forward(list(range(1, CHUNK + 1)), 0, "last")).cpu()
            times.append(time.perf_counter() - started)
    finally:
        await sequence.aclose()
    return statistics.median(times[1:])
