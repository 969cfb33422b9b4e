"""The paper's table of speeds (arXiv 2311.14030), recomputed from its own inputs, with and without
a round trip time.

Its formula: tok/s = 1 / (1/decoder + 1/M + 1/LM head + transfer time). Its inputs, as far as the
paper and its authors' text give them (https://wanglamao.github.io/private_lora/privatelora_en.html):
one A100 80G (1935 GB/s), an iPhone 13 Pro Max (42.7 GB/s), 60 Mbps to the cloud and 100 Mbps back,
16 bits a number, and the whole model's speed on the A100 with transformers, which they measured.
``ASSUMPTIONS`` says what had to be assumed besides. No number is fitted to the published figures;
one choice, how many blocks a layer exchanges, follows the authors' example and agrees with them.

The honest version adds (1 + P) * RTT, for the bytes that the paper counts and for those that an
exchange of q, k and v really sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from privatelora.benchmarks.predict import TokenTime, WireBytes, step_nbytes, token_time
from privatelora.benchmarks.predict_hardware import A100_80G, IPHONE_13_PRO_MAX, Link
from privatelora.benchmarks.predict_shapes import ModelShape, named_shape
from privatelora.benchmarks.predict_terms import Scenario, Terms
from privatelora.partition.plan import TARGETS, Plan
from privatelora.runtime.codecs import Codecs

PAPER_LINK = Link(0.0, 60e6, 100e6)
RANK = 128
NUMBER_NBYTES = 2
GROUPS: tuple[int | Literal["all"], ...] = (1, 8, 16, "all")
RTTS_MS = (0.0, 1.0, 5.0, 20.0, 80.0)
_FP16 = Codecs("fp16", "fp16", "fp16", "fp16")

ASSUMPTIONS = (
    "The decoder's rate is the whole model's on one A100, which the authors measured with "
    "transformers: 37.2 (7B, in the table), 27.8 and 16.7 (13B and 30B, in their text). It is an "
    "input: the A100's memory alone would allow 146, 75 and 30.",
    "The LM head was measured too, on the phone, and is not given: its 16-bit weights are read "
    "once at 42.7 GB/s. So are those of M; A and B are read on the A100.",
    "Transfer, the paper's count: per token the hidden state, and per layer one block of rank "
    "numbers, each way, 16 bits each, as in their example of 32.8 kb. Only with one block does the "
    "published difference between ranks come out. Exchanging q, k and v, as their code does, takes "
    "three: the rows that say q k v, up to 9 % below what was published without any round trip.",
    "No headers and no folding in the paper's count; both in the rows that say q k v. Those have "
    "rank 128 in both directions, and a group shares one A.",
)


@dataclass(frozen=True)
class Published:
    """What was published of one size. ``of_gpu``: the model alone; ``by_rank``: PrivateLoRA."""

    size: str
    shape: ModelShape
    of_gpu: float
    by_rank: dict[int, float]


def published() -> Sequence[Published]:
    """Tokens/s: rank 128 from the paper's table, rank 64 from its authors' text."""
    figures = {
        "7b": (37.2, {128: 27.1, 64: 27.8}),
        "13b": (27.8, {128: 20.5, 64: 21.1}),
        "30b": (16.7, {128: 12.9, 64: 13.2}),
    }
    return [
        Published(size.upper(), shape, *figures[size])
        for size in figures
        if (shape := named_shape(size)) is not None
    ]


def paper_nbytes(shape: ModelShape, rank: int) -> WireBytes:
    """What the paper counts; its round trips are those of an exchange at every layer."""
    config = shape.config
    nbytes = (config.hidden_size + config.num_layers * rank) * NUMBER_NBYTES
    return WireBytes(nbytes, nbytes, config.num_layers)


def paper_terms(model: Published, rank_up: int, rank_down: int, num_points: int) -> Terms:
    """1/decoder with A and B, 1/M and 1/LM head.

    ``num_points``: A matrices of ``rank_up`` rows that the cloud computes with.
    """
    shape, config = model.shape, model.shape.config
    outputs = sum(config.projection_size(target) for target in TARGETS)
    weights_of_m = config.num_layers * len(TARGETS) * rank_up * rank_down
    added = num_points * rank_up * config.hidden_size + config.num_layers * outputs * rank_down
    return Terms(
        cloud_s=1 / model.of_gpu + A100_80G.roofline_s(added * NUMBER_NBYTES, 2 * added),
        exchange_s=IPHONE_13_PRO_MAX.roofline_s(weights_of_m * NUMBER_NBYTES, 2 * weights_of_m),
        lm_head_s=IPHONE_13_PRO_MAX.roofline_s(
            shape.head_weights * NUMBER_NBYTES, 2 * shape.head_weights
        ),
    )


def paper_time(model: Published, rank: int, link: Link) -> TokenTime:
    """One token by the paper's formula and count of bytes, and a round trip for each layer."""
    num_a = model.shape.config.num_layers * len(TARGETS)
    terms = paper_terms(model, rank, rank, num_a)
    return token_time(terms, paper_nbytes(model.shape, rank), link)


def sent_time(model: Published, plan: Plan, link: Link) -> TokenTime:
    """One token by the same formula with the bytes and round trips of a plan."""
    terms = paper_terms(model, plan.rank_up, plan.rank_down, len(plan.points) * plan.num_blocks)
    return token_time(terms, sent_nbytes(model.shape, plan), link)


def sent_nbytes(shape: ModelShape, plan: Plan) -> WireBytes:
    """What we send for a plan in fp16."""
    return step_nbytes(
        Scenario(shape, plan, _FP16, PAPER_LINK, cloud=A100_80G, edge=IPHONE_13_PRO_MAX)
    )


def paper_table() -> dict[str, Any]:
    """Every size as the paper has it, and per layer and grouped at several distances."""
    links = [replace(PAPER_LINK, rtt_s=rtt_ms / 1e3) for rtt_ms in RTTS_MS]
    rows: list[dict[str, Any]] = []
    for model in published():
        roofline = A100_80G.memory_bytes_per_s / model.shape.token_nbytes
        base = {"model": model.size, "way": "base", "roofline_tokens_per_s": roofline}
        rows.append({**base, "published_tokens_per_s": model.of_gpu})
        for rank in (64, RANK):
            nbytes = paper_nbytes(model.shape, rank)
            times = [paper_time(model, rank, link) for link in links]
            row = _row(model, f"paper's count, rank {rank}", nbytes, times)
            rows.append({**row, "published_tokens_per_s": model.by_rank[rank]})
        for every in GROUPS:
            plan = model.shape.plan(every, RANK, RANK)
            way = "per layer" if every == 1 else f"every {every}"
            times = [sent_time(model, plan, link) for link in links]
            row = _row(model, f"q k v, {way}", sent_nbytes(model.shape, plan), times)
            rows.append({**row, "every": every})
    for row in rows:
        if "by_rtt_ms" in row and (said := row.get("published_tokens_per_s")):
            row["deviation"] = row["by_rtt_ms"]["0"] / said - 1
    return {
        "benchmark": "predict",
        "source": "arXiv 2311.14030, table of speeds; 60 Mbps up, 100 Mbps down",
        "assumptions": list(ASSUMPTIONS),
        "rtts_ms": list(RTTS_MS),
        "rows": rows,
    }


def _row(
    model: Published, way: str, nbytes: WireBytes, times: Sequence[TokenTime]
) -> dict[str, Any]:
    nearest = times[0]
    return {
        "model": model.size,
        "way": way,
        "round_trips_per_token": nbytes.round_trips,
        "nbytes_per_token": nbytes.up + nbytes.down,
        "parts_ms": {
            "decoder": nearest.cloud_s * 1e3,
            "m": nearest.exchange_s * 1e3,
            "lm_head": nearest.lm_head_s * 1e3,
            "transfer": (nearest.up_s + nearest.down_s) * 1e3,
        },
        "by_rtt_ms": {
            f"{rtt_ms:g}": 1 / time.total_s for rtt_ms, time in zip(RTTS_MS, times, strict=True)
        },
    }
