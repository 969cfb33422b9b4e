"""The layers one side runs: positions, cache, masks, segments and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from privatelora.errors import RequestError
from privatelora.partition.models.config import RopeConfig
from privatelora.runtime.decoder import UPCAST_ROWS, linear, step_context
from privatelora.runtime.engine import Engine, Step
from privatelora.runtime.exchange import run_locally
from privatelora.runtime.kv_cache import KVPool, attention_dtype
from privatelora.runtime.language_model import UnsplitModel
from privatelora.runtime.rotary import apply_rotary_, inverse_frequencies, rotary
from tests.unit.world import BOTH_BORDERS, CPU, World, assert_same, solo, world

PROMPT = list(range(20, 50))

# Rotary embedding

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, tuple[RopeConfig, dict[str, Any]]] = {
    "default": (RopeConfig(theta=10_000.0), {"rope_type": "default"}),
    "theta": (RopeConfig(theta=500_000.0), {"rope_type": "default", "rope_theta": 500_000.0}),
    "linear": (
        RopeConfig(theta=10_000.0, kind="linear", factor=4.0),
        {"rope_type": "linear", "factor": 4.0},
    ),
    "llama3": (
        RopeConfig(theta=10_000.0, kind="llama3", original_max_positions=64, **LLAMA3),
        {"rope_type": "llama3", "original_max_position_embeddings": 64, **LLAMA3},
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_is_that_of_transformers(name: str) -> None:
    ours, theirs = ROPES[name]
    num_heads, head_dim, n, position = 3, 16, 12, 117
    config = LlamaConfig(
        hidden_size=num_heads * head_dim,
        num_attention_heads=num_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10_000.0, **theirs},
    )
    embedding = LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(ours, head_dim)
    torch.testing.assert_close(frequencies, embedding.inv_freq, rtol=1e-6, atol=0)
    heads = torch.randn(n, num_heads, head_dim, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(position, position + n).unsqueeze(0)
    cos, sin = embedding(heads, positions)
    expected, _ = apply_rotary_pos_emb(
        heads.transpose(0, 1).unsqueeze(0), heads.transpose(0, 1).unsqueeze(0), cos, sin
    )
    apply_rotary_(heads, rotary(frequencies, position, n, torch.float32))
    torch.testing.assert_close(heads, expected[0].transpose(0, 1), rtol=0, atol=1e-5)


# Masks and cache


def brute_force_mask(position: int, n: int, window: int | None) -> torch.Tensor:
    rows = [
        [
            column <= row and (window is None or row - column < window)
            for column in range(position + n)
        ]
        for row in range(position, position + n)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("position", [0, 1, 15, 16, 40])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_masks(position: int, n: int) -> None:
    config = world("mistral").config
    assert config.sliding_window == 16
    kv = KVPool(config, config.num_layers, 64, CPU, torch.float32).open(64)
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    context = step_context(config, kv, position, n, frequencies)
    for found, window in [(context.full, None), (context.sliding, 16)]:
        visible = torch.zeros(n, position + n, dtype=torch.bool)
        visible[:, found.start :] = True if found.mask is None else found.mask == 0
        assert torch.equal(visible, brute_force_mask(position, n, window))


@pytest.mark.parametrize("family", ["llama3-rope", "mistral", "qwen3"])
async def test_steps_of_any_length_give_the_same_logits(family: str) -> None:
    model = world(family).unsplit()
    whole = await solo(model, PROMPT)
    for size in (1, 7, 29):
        steps = [PROMPT[start : start + size] for start in range(0, len(PROMPT), size)]
        assert_same(await solo(model, *steps), whole)


@pytest.mark.parametrize("family", ["llama", "mistral"])
async def test_an_earlier_step_forgets_what_came_after(family: str) -> None:
    model = world(family).unsplit()
    other = [*PROMPT[:12], *range(100, 120)]
    expected = await solo(model, other)
    sequence = await model.open_sequence(40)
    await sequence.forward(PROMPT, 0, "none")
    for position in (12, 13, 12, 0):  # again and again, back and forth
        logits = await sequence.forward(other[position:], position, "all")
        assert_same(logits, expected[position:])
    assert_same(await sequence.forward(other[31:], 31, "last"), expected[31:])


async def test_only_the_rows_asked_for() -> None:
    model = world().unsplit()
    every_row = await solo(model, PROMPT)
    sequence = await model.open_sequence(len(PROMPT))
    assert (await sequence.forward(PROMPT, 0, "none")).shape == (0, 199)
    assert_same(await sequence.forward(PROMPT, 0, "last"), every_row[-1:])


async def test_a_sequence_is_not_longer_than_was_asked_for() -> None:
    model = world().unsplit()
    sequence = await model.open_sequence(10)
    with pytest.raises(RequestError, match="positions 0 to 10 do not fit a sequence of 10"):
        await sequence.forward(PROMPT[:11], 0, "last")
    before = await sequence.forward(PROMPT[:10], 0, "last")
    with pytest.raises(RequestError):
        await sequence.forward([1], 10, "last")
    assert_same(await sequence.forward([PROMPT[9]], 9, "last"), before)
    with pytest.raises(RequestError, match="context of 256"):
        await model.open_sequence(257)


@pytest.mark.parametrize(
    ("token_ids", "message"), [([], "no tokens"), ([5, 199], "0 to 198"), ([-1], "0 to 198")]
)
async def test_tokens_that_do_not_exist(token_ids: list[int], message: str) -> None:
    sequence = await world().unsplit().open_sequence(10)
    with pytest.raises(RequestError, match=message):
        await sequence.forward(token_ids, 0, "last")


# Segments


def segments(engine: Engine, split: World, step: Step, *, precompute: bool) -> list[int]:
    """Run a step to its end; the points it asked for."""
    asked, matrices = [], split.matrices()
    while (point := engine.advance(step)) is not None:
        assert step.z is not None
        asked.append(point.index)
        if precompute:
            engine.precompute(step)
            engine.precompute(step)  # nothing is added twice
        step.supply(point.layers, matrices.reply(point, step.z))
    return asked


@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize("every", [1, 3])
def test_precomputing_changes_nothing(every: int, num_rows: int) -> None:
    split = world(every=every)
    engine = split.engine()
    hidden_states = split.ends().embed(PROMPT[:num_rows])
    ends = []
    for precompute in (False, True):
        step = engine.begin(hidden_states, 0, engine.new_cache(num_rows))
        asked = segments(engine, split, step, precompute=precompute)
        assert asked == [point.index for point in split.plan.points]
        ends.append(step.hidden_states)
    assert torch.equal(*ends)


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"layers": "1,3", "targets": "v"}])
def test_without_matrices_the_model_is_the_base_model(options: dict[str, Any]) -> None:
    split = world(**options)
    hidden_states = split.ends().embed(PROMPT)
    ends = []
    for plan in (split.plan, None):
        engine = Engine(
            split.config,
            plan,
            range(split.config.num_layers),
            dict(split.tensors),
            CPU,
            torch.float32,
        )
        step = engine.begin(hidden_states, 0, engine.new_cache(len(PROMPT)))
        run_locally(engine, step, None)
        ends.append(step.hidden_states)
    assert torch.equal(*ends)


@pytest.mark.parametrize("options", [{}, BOTH_BORDERS, {"every": 4, "targets": "q,v"}])
def test_replies_follow_the_formula(options: dict[str, Any]) -> None:
    split = world(**options)
    plan, matrices = split.plan, split.matrices()
    for point in plan.points:
        z = torch.randn(5, plan.z_size, generator=torch.Generator().manual_seed(point.index))
        expected = []
        for layer in point.layers:
            for target in plan.targets:
                start = plan.block(target) * plan.rank_up
                block = z[:, start : start + plan.rank_up]
                expected.append(block @ split.weights[layer, target].T)
        torch.testing.assert_close(matrices.reply(point, z), torch.cat(expected, dim=1))


# Dtypes and devices


EPSILON = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("num_rows", [0, 1, UPCAST_ROWS - 1, UPCAST_ROWS, 8, 9, 10, 40, 67])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", EPSILON)
def test_linear_is_as_exact_as_its_dtype(dtype: torch.dtype, has_bias: bool, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((num_rows, 64), (32, 64), (32,))
    )
    found = linear(x, weight, bias if has_bias else None)
    exact = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    assert found.dtype is dtype
    epsilon = EPSILON[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=2 * epsilon, atol=20 * epsilon)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
async def test_half_precision_is_close(family: str, dtype: torch.dtype) -> None:
    split = world(family)
    expected = await solo(split.unsplit(), PROMPT)
    half = split.unsplit(dtype=dtype)
    tolerance = expected.abs().max().item() * (0.01 if dtype is torch.float16 else 0.08)
    # Many rows, few rows, and one at a time: each takes a way of its own.
    for steps in ([PROMPT], [PROMPT[:25], PROMPT[25:]], [[token] for token in PROMPT]):
        logits = await solo(half, *steps)
        assert logits.dtype is torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def test_attention_on_a_cpu_is_in_float32() -> None:
    assert attention_dtype(CPU, torch.bfloat16) is torch.float32
    assert attention_dtype(torch.device("cuda"), torch.bfloat16) is torch.bfloat16
    engine = world().engine(dtype=torch.float16)
    assert engine.new_pool(4).dtype is torch.float32


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
async def test_cuda_equals_cpu(family: str) -> None:
    split = world(family)
    device = torch.device("cuda")

    async def logits(model: UnsplitModel) -> torch.Tensor:
        return (await solo(model, PROMPT[:20], *([token] for token in PROMPT[20:]))).cpu()

    expected = await logits(split.unsplit())
    found = await logits(split.unsplit(device=device))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    half = await logits(split.unsplit(device=device, dtype=torch.bfloat16))
    torch.testing.assert_close(half, expected, rtol=0, atol=expected.abs().max().item() * 0.08)
