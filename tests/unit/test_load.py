"""How the load benchmark counts, and how many descriptors a daemon asks for."""

from __future__ import annotations

import resource

import pytest

from privatelora.benchmarks.load_worker import tokens_between
from privatelora.runtime.loop import raise_descriptor_limit, run


@pytest.mark.parametrize(
    ("start", "end", "tokens", "largest_gap_s"),
    [
        (10.0, 12.0, 2.0, 1.0),
        (10.5, 11.5, 1.0, 1.0),
        (12.0, 16.0, 1.0, 4.0),  # stood still
        (12.0, 13.0, 0.25, 4.0),
        (15.0, 18.0, 0.25 + 2.0, 4.0),
    ],
)
def test_tokens_count_by_parts(
    start: float, end: float, tokens: float, largest_gap_s: float
) -> None:
    moments = [10.0, 11.0, 12.0, 16.0, 17.0, 18.0, 19.0]
    found = tokens_between(moments, start, end)
    assert found == pytest.approx((tokens, largest_gap_s))


def test_a_daemon_may_open_as_many_files_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def limit() -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert run(limit()) == hard
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
