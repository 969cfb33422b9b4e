"""When something may begin that may not begin too often."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.runtime.rate_limit import BURST_S, RateLimit

ROUNDING_S = 1e-6
rates = st.floats(0.05, 2000)
arrivals = st.lists(st.floats(0, 0.5) | st.just(0.0), min_size=1, max_size=200).map(
    lambda gaps: list(itertools.accumulate(gaps))
)


def begin_all(rate: RateLimit, times: list[float]) -> list[float]:
    """When those that come at ``times`` begin, each after the one before."""
    begun: list[float] = []
    now = 0.0
    for time in times:
        now = max(now, time)
        now += rate.delay(now)
        rate.take(now)
        begun.append(now)
    return begun


@given(rates, arrivals)
def test_no_span_has_more_than_its_share(per_s: float, times: list[float]) -> None:
    begun = begin_all(RateLimit(per_s), times)
    for i, start in enumerate(begun):
        for j in range(i, len(begun)):
            most = per_s * (begun[j] - start + ROUNDING_S) + max(1.0, per_s * BURST_S)
            assert j - i + 1 <= most + ROUNDING_S


@given(rates, arrivals)
def test_nothing_is_held_up_without_need(per_s: float, times: list[float]) -> None:
    """Who begins late ends a span in which there were as many as there may be."""
    begun = begin_all(RateLimit(per_s), times)
    for i, (time, at) in enumerate(zip(times, begun, strict=True)):
        assert at >= time
        if at <= time + ROUNDING_S:
            continue
        fullest = max(i - k + 1 - per_s * (at - begun[k]) for k in range(i + 1))
        assert fullest == pytest.approx(max(1.0, per_s * BURST_S), abs=per_s * ROUNDING_S)


@given(rates, st.integers(1, 300))
def test_a_burst_and_then_evenly(per_s: float, num: int) -> None:
    begun = begin_all(RateLimit(per_s), [0.0] * num)
    at_once = max(1, int(per_s * BURST_S))
    for number, at in enumerate(begun):
        later = max(0, number + 1 - max(1.0, per_s * BURST_S)) / per_s
        assert at == pytest.approx(later, abs=ROUNDING_S)
    assert all(at <= ROUNDING_S for at in begun[:at_once])


def test_what_was_not_used_does_not_add_up() -> None:
    rate = RateLimit(10)
    begin_all(rate, [0.0] * 10)
    assert not rate.is_unused(0.9)
    assert rate.is_unused(1.0)
    assert [rate.delay(1e6)] == [0.0]
    begun = begin_all(rate, [1e6] * 11)
    assert begun[9] == 1e6
    assert begun[10] == pytest.approx(1e6 + 0.1)
