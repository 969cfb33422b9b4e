"""The generation loop: what it runs, when it stops, and what is left when it fails."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
import torch

from privatelora.errors import ConnectionClosed, RequestError
from privatelora.runtime.engine import Engine
from privatelora.runtime.figures import figures, figures_line
from privatelora.runtime.generation import (
    Context,
    FinishReason,
    GenerationStats,
    common_prefix,
    generate_text,
    generate_tokens,
)
from privatelora.runtime.language_model import LanguageModel, Traffic, UnsplitModel
from privatelora.runtime.sampling_params import SamplingParams
from tests.partition.tiny import tiny_model, tiny_tokenizer
from tests.unit.fakes import FakeModel
from tests.unit.world import CPU, World, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

EOS = (10,)


async def tokens_of(
    context: Context, prompt: list[int], stats: GenerationStats | None = None, **params: Any
) -> list[int]:
    stats = stats or GenerationStats()
    tokens = generate_tokens(context, prompt, SamplingParams(**params), EOS, stats)
    return [token async for token in tokens]


# How it ends


async def test_it_stops_at_the_end_of_sequence_token() -> None:
    stats = GenerationStats()
    context = await Context.open(FakeModel())
    assert await tokens_of(context, [5, 6], stats) == [7, 8, 9]
    assert stats.finish_reason is FinishReason.STOP
    assert stats.token_ids == [7, 8, 9, 10]
    assert stats.completion_tokens == 4


async def test_it_stops_after_max_tokens() -> None:
    stats = GenerationStats()
    context = await Context.open(FakeModel())
    assert await tokens_of(context, [1, 2], stats, max_tokens=3) == [3, 4, 5]
    assert stats.finish_reason is FinishReason.LENGTH
    assert stats.completion_tokens == 3


async def test_it_stops_when_the_context_is_full() -> None:
    stats, model = GenerationStats(), FakeModel(max_positions=6)
    context = await Context.open(model)
    assert await tokens_of(context, [1, 2, 3], stats) == [4, 5, 6]
    assert stats.finish_reason is FinishReason.LENGTH
    # The last token is not run: nobody asks what comes after it.
    assert model.sequences[0].cached == [1, 2, 3, 4, 5]


async def test_ignoring_the_end_of_sequence_token() -> None:
    def eos_then_three(token_ids: list[int]) -> int:
        return 10

    stats, model = GenerationStats(), FakeModel(eos_then_three)
    context = await Context.open(model)
    tokens = await tokens_of(context, [5], stats, ignore_eos=True, max_tokens=4)
    assert 10 not in tokens
    assert len(tokens) == 4
    assert stats.finish_reason is FinishReason.LENGTH


async def test_the_end_of_sequence_token_at_once() -> None:
    stats = GenerationStats()
    context = await Context.open(FakeModel())
    assert await tokens_of(context, [9], stats) == []
    assert (stats.completion_tokens, stats.finish_reason) == (1, FinishReason.STOP)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), (list(range(1, 9)), "8 tokens and the context holds 8"), ([1] * 40, "shorten")],
)
async def test_prompts_without_an_answer(prompt: list[int], message: str) -> None:
    model = FakeModel(max_positions=8)
    context = await Context.open(model)
    with pytest.raises(RequestError, match=message):
        await tokens_of(context, prompt)
    assert model.steps == []
    assert await tokens_of(context, list(range(1, 8))) == [8]  # the longest possible


async def test_more_than_the_context_holds_is_refused() -> None:
    context = await Context.open(FakeModel(), 4)
    with pytest.raises(RequestError, match="5 tokens do not fit the context of 4"):
        await context.advance([1, 2, 3, 4, 5])


async def test_a_model_may_turn_out_to_offer_less_once_it_is_reached() -> None:
    class Shrinking(FakeModel):
        async def open_sequence(self, max_positions: int) -> Any:
            self.max_positions = 6
            return await super().open_sequence(min(max_positions, 6))

    stats = GenerationStats()
    context = await Context.open(Shrinking())
    assert context.max_positions == 6
    assert await tokens_of(context, [1, 2, 3], stats) == [4, 5, 6]
    assert stats.finish_reason is FinishReason.LENGTH


# What it runs


async def test_a_second_turn_runs_only_what_is_new() -> None:
    model = FakeModel()
    context = await Context.open(model)
    answer = await tokens_of(context, [3, 4, 5, 6, 7], max_tokens=2)
    assert model.taken_steps() == [([3, 4, 5, 6, 7], 0, "last"), ([8], 5, "last")]
    stats = GenerationStats()
    await tokens_of(context, [3, 4, 5, 6, 7, *answer, 50, 51], stats, max_tokens=1)
    # 9, the last token of the answer, was sampled and never run.
    assert model.taken_steps() == [([9, 50, 51], 6, "last")]
    assert (stats.prompt_tokens, stats.cached_tokens) == (9, 6)


async def test_a_prompt_that_differs_is_run_from_where_it_differs() -> None:
    model = FakeModel()
    context = await Context.open(model)
    await tokens_of(context, [3, 4, 5, 6], max_tokens=1)
    model.taken_steps()
    await tokens_of(context, [3, 4, 70, 71], max_tokens=1)
    assert model.taken_steps() == [([70, 71], 2, "last")]
    assert model.sequences[0].cached == [3, 4, 70, 71]


@pytest.mark.parametrize("prompt", [[3, 4, 5], [3, 4]])
async def test_a_prompt_that_is_cached_whole_runs_its_last_token_again(prompt: list[int]) -> None:
    model, stats = FakeModel(), GenerationStats()
    context = await Context.open(model)
    await tokens_of(context, [3, 4, 5], max_tokens=1)
    model.taken_steps()
    assert await tokens_of(context, prompt, stats, max_tokens=1) == [prompt[-1] + 1]
    assert model.taken_steps() == [(prompt[-1:], len(prompt) - 1, "last")]
    assert stats.cached_tokens == len(prompt) - 1


async def test_long_prompts_go_in_chunks() -> None:
    model = FakeModel(max_step_positions=4)
    prompt = list(range(20, 30))
    context = await Context.open(model)
    await tokens_of(context, prompt, max_tokens=1)
    assert model.steps == [
        ([20, 21, 22, 23], 0, "none"),
        ([24, 25, 26, 27], 4, "none"),
        ([28, 29], 8, "last"),
    ]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([], [1], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 9, 3], [1, 2, 3], 1),
        ([9], [1], 0),
    ],
)
def test_common_prefix(a: list[int], b: list[int], expected: int) -> None:
    assert common_prefix(a, b) == expected


# When it is cut off


async def test_closing_early_leaves_the_context_usable() -> None:
    model = FakeModel()
    context = await Context.open(model)
    stats = GenerationStats()
    tokens = generate_tokens(context, [3, 4], SamplingParams(), EOS, stats)
    async with aclosing(tokens):
        assert [await anext(tokens), await anext(tokens)] == [5, 6]
    assert stats.finish_reason is None
    model.taken_steps()
    assert await tokens_of(context, [3, 4, 5, 60], max_tokens=2) == [61, 62]
    assert model.taken_steps() == [([60], 3, "last"), ([61], 4, "last")]


async def test_a_step_that_fails_half_way_is_run_again() -> None:
    model = FakeModel(max_step_positions=4)
    model.num_kept = 1000
    context = await Context.open(model)
    prompt = list(range(20, 31))
    await tokens_of(context, prompt[:6], max_tokens=1)
    model.taken_steps()
    model.failures = [ConnectionClosed("gone")]
    with pytest.raises(ConnectionClosed, match="gone"):
        await tokens_of(context, [*prompt[:3], 50, 51, 52, 53, 54])
    assert context.token_ids == prompt[:3]
    model.taken_steps()
    assert await tokens_of(context, prompt, max_tokens=1) == [31]
    assert model.taken_steps() == [
        (prompt[3:7], 3, "none"),
        (prompt[7:11], 7, "last"),
    ]


async def test_a_failure_after_some_chunks_keeps_those() -> None:
    model = FakeModel(max_step_positions=2)
    context = await Context.open(model)
    assert await tokens_of(context, [1], max_tokens=1) == [2]
    model.failures = [ConnectionClosed("gone")]

    def fail_later(token_ids: list[int]) -> int:
        raise AssertionError("no token is due")

    model.continuation = fail_later
    with pytest.raises(ConnectionClosed):
        await context.advance([1, 30, 31, 32, 33])
    assert context.token_ids == [1]


# What it took


async def test_figures() -> None:
    model, stats = FakeModel(max_step_positions=4), GenerationStats()
    context = await Context.open(model)
    await tokens_of(context, [20, 21], max_tokens=1)
    await tokens_of(context, list(range(20, 30)), stats, max_tokens=4)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (10, 2, 4)
    assert stats.prefill_traffic == Traffic(4, 800, 80)
    assert stats.decode_traffic == Traffic(6, 300, 30)
    assert stats.time_to_first_token_s > 0
    assert stats.decode_s > 0
    assert stats.prefill_tokens_per_s == pytest.approx(8 / stats.time_to_first_token_s)
    assert stats.decode_tokens_per_s == pytest.approx(3 / stats.decode_s)
    shown = figures(stats)
    assert (shown["round_trips_per_token"], shown["bytes_to_cloud_per_token"]) == (2, 100)
    assert "2 round trips, 100 bytes up and 10 down" in figures_line(stats)


async def test_figures_of_nothing() -> None:
    for stats in (GenerationStats(), GenerationStats(completion_tokens=1)):
        assert set(figures(stats).values()) <= {0, 1}
        assert "round trips" not in figures_line(stats)


# Text


class TinyText:
    """A model that says ``text``, whatever it is asked, and then ends."""

    def __init__(self, text: str) -> None:
        fast = tiny_tokenizer()
        self.tokenizer = fast.backend_tokenizer
        self.eos_id: int = fast.eos_token_id
        self.script = [*self.tokenizer.encode(text).ids, self.eos_id]
        self.model = FakeModel(lambda token_ids: self.script[len(token_ids) - 2])

    async def pieces(self, stats: GenerationStats, **params: Any) -> list[str]:
        context = await Context.open(self.model)
        pieces = generate_text(
            context, self.tokenizer, [5, 6], SamplingParams(**params), (self.eos_id,), stats
        )
        return [piece async for piece in pieces]


async def test_text_comes_in_pieces() -> None:
    stats = GenerationStats()
    pieces = await TinyText("The weather in 中 turns").pieces(stats)
    assert "".join(pieces) == "The weather in 中 turns"
    assert len(pieces) > 5
    assert all(pieces)
    assert stats.finish_reason is FinishReason.STOP


async def test_a_stop_string_ends_the_answer() -> None:
    stats, said = GenerationStats(), TinyText("one two STOP three")
    assert "".join(await said.pieces(stats, stop=("STOP",))) == "one two "
    assert stats.finish_reason is FinishReason.STOP
    assert len(said.model.steps) < len(said.script)  # nothing was run for what came after
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}  # nothing is left to be tidied up


async def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    stats = GenerationStats()
    pieces = await TinyText("one STO").pieces(stats, stop=("STOP",))
    assert "".join(pieces) == "one STO"


async def test_length_cuts_text_off() -> None:
    stats = GenerationStats()
    said = TinyText("one two three")
    text = "".join(await said.pieces(stats, max_tokens=3, stop=("xyz",)))
    assert text == said.tokenizer.decode(said.script[:3])
    assert stats.finish_reason is FinishReason.LENGTH


# Over a real model


def unchunked(split: World) -> UnsplitModel:
    return split.unsplit()


def chunked(split: World) -> UnsplitModel:
    model = split.unsplit()
    model.max_step_positions = 5
    return model


PROMPT = [1, *range(20, 38)]


async def greedy(model: LanguageModel, prompt: list[int], num_tokens: int = 12) -> list[int]:
    context = await Context.open(model)
    return await tokens_of(context, prompt, max_tokens=num_tokens, ignore_eos=True)


@pytest.mark.parametrize("family", ["llama", "mistral"])
async def test_chunks_change_nothing(family: str) -> None:
    split = world(family)
    assert await greedy(chunked(split), PROMPT) == await greedy(unchunked(split), PROMPT)


async def test_cached_turns_change_nothing() -> None:
    model = chunked(world())
    context = await Context.open(model)
    answer = await tokens_of(context, PROMPT, max_tokens=6, ignore_eos=True)
    second = [*PROMPT, *answer, 77, 78, 79]
    third = [*PROMPT[:9], 90, 91]
    for prompt in (second, third, second):
        found = await tokens_of(context, prompt, max_tokens=12, ignore_eos=True)
        assert found == await greedy(model, prompt)


async def test_equal_to_transformers_generate() -> None:
    split = world("qwen2")
    num_layers = split.config.num_layers
    engine = Engine(split.config, None, range(num_layers), dict(split.tensors), CPU, torch.float32)
    context = await Context.open(UnsplitModel(split.ends(), engine, None))
    found = await tokens_of(context, PROMPT, max_tokens=20, repetition_penalty=1.3, ignore_eos=True)
    ids = torch.tensor([PROMPT])
    expected = tiny_model("qwen2").generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        repetition_penalty=1.3,
        min_new_tokens=20,
        max_new_tokens=20,
        eos_token_id=10,
    )
    assert found == expected[0, len(PROMPT) :].tolist()
