"""What payload codecs do to a model's answers, and how many bytes they save.

Method. A model is split in float32 with an adapter that is not zero (random M, since its
numbers, not its knowledge, go through the codecs), and both ends run in this process over
``inproc``. Text is sampled from that very model with everything sent in fp32, or read from a
file, and cut into sequences. Then the same text is run through the model with one codec at a
time for the tensors of one direction (the rest in fp32), then of both, and with the settings'
default. Every position's distribution is compared with that of fp32: ``kl`` is the mean of
KL(fp32 || codec) in nats, ``top1_agreement`` the share of positions with the same most likely
token, ``perplexity`` that of the text. Codecs work on one row at a time, so what holds for a
text at once holds for decoding it. Bytes per token are counted while decoding.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from privatelora.benchmarks.cost import full_hidden_states_nbytes, token_cost
from privatelora.benchmarks.measure import machine_facts
from privatelora.errors import ConfigError
from privatelora.partition.adapter import init_adapter, save_adapter
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import make_plan
from privatelora.partition.split import make_basis, partition_checkpoint
from privatelora.runtime.cloud import Cloud
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.config import CloudConfig, EdgeConfig
from privatelora.runtime.edge import Edge
from privatelora.runtime.generation import Context, GenerationStats, generate_tokens
from privatelora.runtime.link_config import DownConfig, PayloadConfig, UpConfig
from privatelora.runtime.loop import run
from privatelora.runtime.sampling_params import SamplingParams

ADDRESS = "inproc://privatelora-bench-quality"
PROMPTS = (
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "What should I cook tonight with rice, eggs and spinach?",
    "List five facts about the planet Jupiter.",
    "Write a Python function that reverses the words of a sentence.",
    "Give me advice for my first day in a new job.",
    "Summarise the causes of the First World War.",
    "How do I train a puppy not to bite?",
)
NUM_DECODED = 16
"""Tokens decoded to count bytes; they are the same for every token but for lz4."""

SHAPES = {
    "per layer, rank 128": Plan(num_layers=32, layers=tuple(range(32))),
    "every 8, rank 32": Plan(
        num_layers=32, layers=tuple(range(32)), every=8, rank_up=32, rank_down=32
    ),
}
"""Arrangements of a 7B model (hidden size 4096, 32 layers, q, k and v) whose bytes are computed."""
HIDDEN_SIZE_7B = 4096
_FP32 = Codecs("fp32", "fp32", "fp32", "fp32")

Report = Callable[[str], None]


@dataclass(frozen=True)
class QualitySettings:
    """One run of the benchmark. ``std``: of the random M."""

    model: str
    basis: str
    every: int
    rank: int
    std: float
    codecs: tuple[str, ...]
    by_kind: bool
    text: Path | None
    num_sequences: int
    num_tokens: int
    directory: Path


@dataclass(frozen=True)
class Variant:
    """One row: what is sent how. ``name`` and ``direction`` are for people."""

    name: str
    direction: str
    codecs: Codecs


def measure_quality(settings: QualitySettings, report: Report) -> dict[str, Any]:
    """Measure every variant against fp32."""
    report("splitting the model")
    _prepare(settings)
    base, rows = run(_measure(settings, report))
    return {
        "benchmark": "quality",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {
            "model": settings.model,
            "basis": settings.basis,
            "every": settings.every,
            "rank": settings.rank,
            "adapter_std": settings.std,
            "text": None if settings.text is None else str(settings.text),
            "num_sequences": settings.num_sequences,
            "num_tokens": settings.num_tokens,
        },
        "base_model": base,
        "full_hidden_states_7b_nbytes": full_hidden_states_nbytes(32, HIDDEN_SIZE_7B),
        "rows": rows,
    }


def variants(names: tuple[str, ...], by_kind: bool) -> Iterator[Variant]:
    """Every codec upward, downward and both ways; by kind each tensor alone; the default."""
    yield Variant("fp32", "both", _FP32)
    for name in names:
        yield Variant(name, "up", Codecs(name, name, "fp32", "fp32"))
        yield Variant(name, "down", Codecs("fp32", "fp32", name, name))
        yield Variant(name, "both", Codecs(name, name, name, name))
        if by_kind:
            yield Variant(name, "up, hidden states", Codecs(name, "fp32", "fp32", "fp32"))
            yield Variant(name, "up, exchange", Codecs("fp32", name, "fp32", "fp32"))
            yield Variant(name, "down, hidden states", Codecs("fp32", "fp32", name, "fp32"))
            yield Variant(name, "down, exchange", Codecs("fp32", "fp32", "fp32", name))
    default = Codecs(*(names[0] for names in astuple(PayloadConfig().preferences())))
    yield Variant("default", "both", default)


def payload_config(codecs: Codecs) -> PayloadConfig:
    """The settings that ask for exactly ``codecs``."""
    return PayloadConfig(
        up=UpConfig(hidden_states=(codecs.hidden_states_up,), exchange=(codecs.exchange_up,)),
        down=DownConfig(
            hidden_states=(codecs.hidden_states_down,), exchange=(codecs.exchange_down,)
        ),
    )


def _prepare(settings: QualitySettings) -> None:
    place = settings.directory
    with open_checkpoint(settings.model) as checkpoint:
        plan = make_plan(
            checkpoint.config,
            every=settings.every,
            rank_up=settings.rank,
            rank_down=settings.rank,
        )
        manifests = partition_checkpoint(
            checkpoint,
            place / "shards",
            plan,
            make_basis(settings.basis, plan, checkpoint),
            dtype=torch.float32,
            replace=True,
        )
    fingerprints = manifests["edge"].fingerprints
    adapter = init_adapter(plan, fingerprints.basis, fingerprints.model, std=settings.std)
    save_adapter(place / "adapter.safetensors", adapter)


async def _measure(
    settings: QualitySettings, report: Report
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """How far the adapter takes the model from its base, and the rows."""
    place = settings.directory
    cloud = Cloud(CloudConfig(listen=ADDRESS, shard=place / "shards/cloud"))
    async with await cloud.listen():
        async with _edge(place, _FP32) as edge:
            texts = await _texts(settings, edge, report)
            expected = [await _log_probs(edge, text) for text in texts]
        async with _edge(place, _FP32, adapted=False) as edge:
            base = await _compare(edge, texts, expected)
        rows: list[dict[str, Any]] = []
        todo = list(variants(settings.codecs, settings.by_kind))
        for number, variant in enumerate(todo):
            report(f"{number + 1} of {len(todo)}: {variant.name} {variant.direction}")
            async with _edge(place, variant.codecs) as edge:
                row = await _compare(edge, texts, expected)
                row["bytes_per_token"] = await _decoded_nbytes(edge, texts[0])
            rows.append({"codec": variant.name, "direction": variant.direction, **row})
            rows[-1] |= _costs(variant.codecs)
    return base, rows


@asynccontextmanager
async def _edge(place: Path, codecs: Codecs, *, adapted: bool = True) -> AsyncIterator[Edge]:
    edge = Edge(
        EdgeConfig(
            cloud=ADDRESS,
            shard=place / "shards/edge",
            adapter=place / "adapter.safetensors" if adapted else None,
            payload=payload_config(codecs),
        )
    )
    try:
        yield edge
    finally:
        await edge.aclose()


async def _texts(settings: QualitySettings, edge: Edge, report: Report) -> list[list[int]]:
    """Token sequences to run: from the file, or sampled from the model itself."""
    if settings.text is not None:
        try:
            ids = edge.text.encode_prompt(settings.text.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {settings.text}: {error}") from error
        n = settings.num_tokens
        texts = [ids[start : start + n] for start in range(0, len(ids) - n + 1, n)]
        if not texts:
            raise ConfigError(f"{settings.text} has {len(ids)} tokens; one sequence takes {n}")
        return texts[: settings.num_sequences]
    texts = []
    for number in range(settings.num_sequences):
        report(f"sampling text {number + 1} of {settings.num_sequences}")
        prompt = PROMPTS[number % len(PROMPTS)]
        ids = edge.text.encode_chat([{"role": "user", "content": prompt}])
        params = SamplingParams(
            temperature=0.7, seed=number, max_tokens=settings.num_tokens, ignore_eos=True
        )
        context = await Context.open(edge.model, len(ids) + settings.num_tokens)
        tokens = generate_tokens(context, ids, params, edge.text.eos_ids, GenerationStats())
        answer = [token async for token in tokens]
        await context.aclose()
        texts.append((ids + answer)[: settings.num_tokens])
    return texts


async def _log_probs(edge: Edge, text: list[int]) -> torch.Tensor:
    """Log-probabilities (len(text), vocab_size) of what follows every position."""
    sequence = await edge.model.open_sequence(len(text))
    try:
        step = edge.model.max_step_positions
        logits = [
            await sequence.forward(text[start : start + step], start, "all")
            for start in range(0, len(text), step)
        ]
    finally:
        await sequence.aclose()
    return torch.log_softmax(torch.cat(logits), dim=-1)


async def _compare(
    edge: Edge, texts: list[list[int]], expected: list[torch.Tensor]
) -> dict[str, float]:
    kl, agreed, surprise, count = 0.0, 0, 0.0, 0
    for text, exact in zip(texts, expected, strict=True):
        found = await _log_probs(edge, text)
        kl += float((exact.exp() * (exact - found)).sum())
        agreed += int((exact.argmax(-1) == found.argmax(-1)).sum())
        surprise += _surprise(found, text)
        count += len(text)
    return {
        "kl": kl / count,
        "top1_agreement": agreed / count,
        "perplexity": math.exp(surprise / len(texts)),
        "positions": count,
    }


def _surprise(log_probs: torch.Tensor, text: list[int]) -> float:
    """Mean negative log-likelihood of a text's tokens in nats, the first one left out."""
    following = torch.tensor(text[1:])
    return float(-log_probs[:-1].gather(1, following.unsqueeze(1)).mean())


async def _decoded_nbytes(edge: Edge, text: list[int]) -> float:
    """Bytes per decoded token, both ways, headers included."""
    sequence = await edge.model.open_sequence(NUM_DECODED + 8)
    try:
        await sequence.forward(text[:8], 0, "last")
        before = sequence.traffic.sent_nbytes + sequence.traffic.received_nbytes
        for position in range(8, 8 + NUM_DECODED):
            await sequence.forward(text[position : position + 1], position, "last")
        after = sequence.traffic.sent_nbytes + sequence.traffic.received_nbytes
    finally:
        await sequence.aclose()
    return (after - before) / NUM_DECODED


def _costs(codecs: Codecs) -> dict[str, Any]:
    """Payload of the 7B shape, and how much less that is than full hidden states."""
    full = full_hidden_states_nbytes(32, HIDDEN_SIZE_7B)
    shapes = {}
    for name, plan in SHAPES.items():
        cost = token_cost(plan, HIDDEN_SIZE_7B, codecs)
        shapes[name] = {
            "payload_nbytes": cost.payload,
            "total_nbytes": cost.total,
            "fewer": 1 - cost.payload / full,
            "fewer_with_headers": 1 - cost.total / full,
        }
    return {"codecs": dict(zip(Codecs.__slots__, astuple(codecs), strict=True)), "7b": shapes}
