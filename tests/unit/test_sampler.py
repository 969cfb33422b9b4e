"""Which tokens are chosen, and how often."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from privatelora.errors import ConfigError, RequestError
from privatelora.runtime.sampler import Sampler
from privatelora.runtime.sampling_params import SamplingParams

PROBABILITIES = torch.tensor([0.05, 0.4, 0.02, 0.2, 0.13, 0.1, 0.06, 0.04])
LOGITS = PROBABILITIES.log()
NUM_DRAWS = 2000


def draws(params: SamplingParams, history: list[int], *banned: int) -> torch.Tensor:
    """How often each token is chosen."""
    sampler = Sampler(params, banned_ids=banned)
    chosen = [sampler.choose(LOGITS, history) for _ in range(NUM_DRAWS)]
    return torch.bincount(torch.tensor(chosen), minlength=len(LOGITS))


def test_greedy_takes_the_largest() -> None:
    assert Sampler(SamplingParams()).choose(LOGITS, [0]) == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-30])
def test_hardly_any_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature))
    assert {sampler.choose(LOGITS * 1000, [0]) for _ in range(20)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_chosen(temperature: float) -> None:
    counts = draws(SamplingParams(temperature=temperature, seed=1), [0], 1, 3)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert counts[4] > 0


@pytest.mark.parametrize(
    ("settings", "candidates"),
    [
        ({}, {0, 1, 2, 3, 4, 5, 6, 7}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5, 6, 7}),
        ({"top_p": 0.5}, {1, 3}),  # the smallest set that reaches it: 0.4 does not, 0.6 does
        ({"top_p": 0.01}, {1}),
        ({"min_p": 0.3}, {1, 3, 4}),  # at least 0.12
        ({"min_p": 1.0}, {1}),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, {1, 3, 4}),
    ],
)
def test_only_candidates_are_chosen_and_each_of_them(
    settings: dict[str, Any], candidates: set[int]
) -> None:
    counts = draws(SamplingParams(temperature=1.0, seed=5, **settings), [0])
    assert set(counts.nonzero().flatten().tolist()) == candidates


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 3.0}, [TemperatureLogitsWarper(3.0)]),
        ({"temperature": 1.0, "top_k": 3}, [TopKLogitsWarper(3)]),
        ({"temperature": 1.0, "top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"temperature": 1.0, "min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.0, "repetition_penalty": 2.0},
            [RepetitionPenaltyLogitsProcessor(2.0)],
        ),
        (
            {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
            [
                TemperatureLogitsWarper(0.7),
                TopKLogitsWarper(6),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_as_often_as_transformers_would(
    settings: dict[str, Any], processors: list[LogitsProcessor]
) -> None:
    history: Any = torch.tensor([[1, 5]])
    scores: Any = LOGITS.unsqueeze(0)
    expected = torch.softmax(LogitsProcessorList(processors)(history, scores)[0], dim=-1)
    found = draws(SamplingParams(seed=11, **settings), [1, 5]) / NUM_DRAWS
    deviation = (expected * (1 - expected) / NUM_DRAWS).sqrt()
    assert bool(((found - expected).abs() <= 5 * deviation).all())


def test_repetition_penalty_applies_to_greedy_too() -> None:
    logits = torch.tensor([1.0, 5.0, 4.0, -1.0])
    assert Sampler(SamplingParams(repetition_penalty=1.5)).choose(logits, [1]) == 2
    assert Sampler(SamplingParams(repetition_penalty=1.1)).choose(logits, [1]) == 1
    assert Sampler(SamplingParams(repetition_penalty=1.5)).choose(logits, [1, 2]) == 1


def test_the_seed_decides() -> None:
    def sequence(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS, [0]) for _ in range(50)]

    assert sequence(3) == sequence(3)
    assert sequence(3) != sequence(4)
    assert sequence(None) != sequence(None)
    torch.manual_seed(0)
    first = sequence(3)
    torch.manual_seed(1)
    assert sequence(3) == first  # torch's own generator has no part in it


def test_the_logits_are_left_as_they_are() -> None:
    logits = LOGITS.clone()
    params = SamplingParams(temperature=0.7, top_k=2, top_p=0.5, repetition_penalty=2.0, seed=0)
    Sampler(params, banned_ids=[4]).choose(logits, [1, 2])
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(temperature: float, bad: float) -> None:
    logits = LOGITS.clone()
    logits[2] = bad
    logits[5] = bad
    with pytest.raises(ConfigError, match="float32"):
        Sampler(SamplingParams(temperature=temperature)).choose(logits, [0])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 2**63},
        {"max_tokens": 0},
        {"stop": "word"},
        {"stop": ["x"] * 17},
        {"unknown": 1},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValidationError, match=name):
        SamplingParams.model_validate(settings)


def test_the_defaults_are_greedy() -> None:
    params = SamplingParams()
    assert (params.temperature, params.repetition_penalty, params.stop) == (0.0, 1.0, ())


@settings(deadline=None)
@given(
    params=st.builds(
        SamplingParams,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 20),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.01, 100),
        seed=st.integers(0, 2**63 - 1),
    )
)
def test_settings_that_are_possible_always_choose_something(params: SamplingParams) -> None:
    assert 0 <= Sampler(params, banned_ids=[1]).choose(LOGITS, [0, 3, 3]) < len(LOGITS)


def test_penalties_count_the_answer_and_not_the_prompt() -> None:
    logits = torch.tensor([3.0, 2.5, 2.2, 0.0])
    sampler = Sampler(SamplingParams(frequency_penalty=1.0), num_prompt_tokens=3)
    history, chosen = [0, 0, 0], []
    for _ in range(4):
        chosen.append(sampler.choose(logits, history))
        history.append(chosen[-1])
    assert chosen == [0, 1, 2, 0]
    once = Sampler(SamplingParams(presence_penalty=1.0), num_prompt_tokens=1)
    assert once.choose(logits, [3, 0, 0, 1]) == 2
    assert once.choose(logits, [3, 0, 0, 1, 2]) == 0, "however often"


def test_bias_is_added() -> None:
    logits = torch.tensor([3.0, 2.5, 2.2, 0.0])
    assert Sampler(SamplingParams(logit_bias={3: 4.0, 0: -100})).choose(logits, [0]) == 3
    assert logits.tolist() == pytest.approx([3.0, 2.5, 2.2, 0.0])
    with pytest.raises(RequestError, match="logit_bias: token ids lie in 0 to 3"):
        Sampler(SamplingParams(logit_bias={4: 1.0})).choose(logits, [0])
