"""The arithmetic of the benchmarks."""

from __future__ import annotations

import pytest

from privatelora.benchmarks.measure import Spread, machine_facts, paired_ratios
from privatelora.benchmarks.worker import MeasureRequest


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(median=2.5, min=1.0, max=10.0)
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0)


def test_ratios_are_paired() -> None:
    # The machine slows down by half from run to run; the ratio does not.
    assert paired_ratios([8.0, 4.0, 2.0], [16.0, 8.0, 4.0]) == Spread(0.5, 0.5, 0.5)
    assert paired_ratios([1.0, 4.0], [2.0, 2.0]) == Spread(1.25, 0.5, 2.0)
    with pytest.raises(ValueError, match="argument"):
        paired_ratios([1.0], [1.0, 2.0])


def test_the_first_tokens_are_left_out_of_the_rate() -> None:
    request = MeasureRequest(prompt_tokens=4, warmup_tokens=2, tokens=3)
    # Slow ones first, then four moments half a second apart: three tokens in 1.5 s.
    times = [0.0, 50.0, 100.0, 100.5, 101.0, 101.5]
    assert len(times) == request.warmup_tokens + request.tokens + 1
    assert request.rate(times) == 2.0


@pytest.mark.parametrize("prompt_tokens", [1, 64, 4096])
def test_the_prompt_has_exactly_the_length_asked_for(prompt_tokens: int) -> None:
    request = MeasureRequest(prompt_tokens=prompt_tokens, warmup_tokens=1, tokens=1)
    assert len(request.prompt_ids) == prompt_tokens
    assert min(request.prompt_ids) >= 100  # no special tokens


def test_the_machine_is_named() -> None:
    facts = machine_facts()
    assert facts["num_cpus"] >= 1
    assert all(facts.values())
