"""What single sessions do to the others on one cloud: a far edge, a long prompt.

Method. As ``serve.py``. A straggler: 15 sessions decode at 5 ms, and one more of an edge that is
500 ms away; compared with the same where that one is near too. A long prompt: 8 sessions decode
at 20 ms when a prompt of 2,000 tokens arrives at the same distance, in chunks or in one; their
largest gap between two tokens before and after it arrives, and its time to first token.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from privatelora.benchmarks.measure import machine_facts
from privatelora.benchmarks.serve import (
    NUM_SKIPPED,
    Report,
    ServeSettings,
    ask,
    connected_edges,
    prepare,
    serving,
    summarise,
    token_times,
)

LONG_PROMPT = 2000
ARRIVES_AFTER_S = 10.0
"""By then the others have decoded a dozen tokens, and have most still before them."""
STRAGGLER_MS = 500.0


def measure_situations(settings: ServeSettings, report: Report) -> dict[str, Any]:
    """What one far edge, and what one long prompt, costs the others."""
    report("splitting the model")
    round_trips = prepare(settings)
    with serving(settings) as address:
        straggler = {
            f"with_one_at_{far_ms:g}_ms": _straggler(settings, address, far_ms, report)
            for far_ms in (5.0, STRAGGLER_MS)
        }
        prompts = {
            name: _long_prompt(settings, address, chunk, report)
            for name, chunk in (("chunks of 64", 64), ("one chunk", LONG_PROMPT))
        }
    return {
        "benchmark": "situations",
        "machine": machine_facts(),
        "settings": {"model": settings.model, "every": settings.every, "dtype": settings.dtype},
        "round_trips_per_token": round_trips,
        "straggler": straggler,
        "long_prompt": prompts,
    }


def _straggler(
    settings: ServeSettings, address: str, far_ms: float, report: Report
) -> dict[str, float]:
    """15 sessions at 5 ms, and one of an edge of its own: what the 15 get."""
    report(f"15 sessions at 5 ms and one at {far_ms:g} ms")
    with connected_edges(settings, address, [5.0, 5.0, far_ms]) as edges:
        near, other = edges[:2], edges[2]
        ask(other, 1, settings.prompt_tokens, 4 if far_ms > 5 else settings.tokens)
        for edge, share in zip(near, (8, 7), strict=True):
            ask(edge, share, settings.prompt_tokens, settings.tokens)
        figures = summarise(token_times(near))
        token_times([other])
    return figures


def _long_prompt(
    settings: ServeSettings, address: str, chunk: int, report: Report
) -> dict[str, float]:
    """8 sessions decode when a long prompt arrives: their largest gap, and its first token."""
    report(f"a prompt of {LONG_PROMPT} tokens among 8 sessions, chunks of {chunk}")
    with (
        connected_edges(settings, address, [20.0, 20.0]) as near,
        connected_edges(settings, address, [20.0], prefill_chunk=chunk, max_positions=4096) as late,
    ):
        for edge in near:
            ask(edge, 4, settings.prompt_tokens, settings.tokens)
        time.sleep(ARRIVES_AFTER_S)
        ask(late[0], 1, LONG_PROMPT, 2)
        prompt = late[0].read_event("decoded")
        times = token_times(near)
    arrived, first = prompt["started"], prompt["times"][0][0]
    gaps = {
        during: max(
            (b - a) * 1e3
            for session in times
            for a, b in itertools.pairwise(session[NUM_SKIPPED:])
            if (b < arrived) == (during == "before")
        )
        for during in ("before", "after")
    }
    return {
        "time_to_first_token_s": first - arrived,
        "largest_gap_before_ms": gaps["before"],
        "largest_gap_after_ms": gaps["after"],
    }
