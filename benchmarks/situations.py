"""What single sessions do to the others on one cloud: a far edge, a long prompt, a flood.

Method. As ``serve.py``. A straggler: 15 sessions decode at 5 ms, and one more of an edge that is
500 ms away; compared with the same where that one is near too. A long prompt: 8 sessions decode
at 20 ms when a prompt of 2,000 tokens arrives at the same distance, in chunks or in one; their
largest gap between two tokens before and after it arrives, and its time to first token. The same
prompt alone, its chunks pipelined, and one after the other on a cloud in lockstep, in turns. A
flood: one session of a client decodes at 5 ms, first alone, then while another client, known by a
token of its own, decodes in 15 sessions and sends one long prompt after the other, then alone
again. The fair share between two clients is a half of the engine's time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from privatelora.benchmarks.measure import Spread, machine_facts, paired_ratios
from privatelora.benchmarks.serve import (
    NUM_SKIPPED,
    OURS,
    Report,
    ServeSettings,
    ask,
    connected_edges,
    prepare,
    serving,
    summarise,
    token_times,
    write_settings,
)
from privatelora.benchmarks.whole_steps import LOCKSTEP
from privatelora.cli._daemons import Daemon
from privatelora.runtime.client_tokens import digest, new_token

LONG_PROMPT = 2000
ARRIVES_AFTER_S = 10.0
"""By then the others have decoded a dozen tokens, and have most still before them."""
STRAGGLER_MS = 500.0
NUM_PROMPTS_ALONE = 3
FLOOD_SESSIONS = 15
FLOOD_TOKENS, FLOOD_PROMPTS = 1500, 200
"""More than the quiet session needs time for."""


def measure_situations(settings: ServeSettings, report: Report) -> dict[str, Any]:
    """What one far edge, one long prompt, and one client's flood cost the others."""
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
    first_token = _first_token(settings, report)
    flood = _flood(settings, report)
    return {
        "benchmark": "situations",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": settings.deployment,
        "round_trips_per_token": round_trips,
        "straggler": straggler,
        "long_prompt": prompts,
        "first_token": first_token,
        "flood": flood,
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


def _first_token(settings: ServeSettings, report: Report) -> dict[str, Any]:
    """Time to the first token of a long prompt alone: pipelined, and chunk by chunk."""
    times: dict[str, list[float]] = {OURS: [], LOCKSTEP: []}
    with ExitStack() as stack:
        edges = {}
        for scheduling in times:
            address = stack.enter_context(serving(settings, scheduling))
            [edges[scheduling]] = stack.enter_context(
                connected_edges(settings, address, [20.0], max_positions=4096)
            )
        for number in range(NUM_PROMPTS_ALONE):
            for scheduling, edge in edges.items():
                report(f"a prompt of {LONG_PROMPT} tokens alone, {scheduling}, {number + 1}")
                ask(edge, 1, LONG_PROMPT, 2)
                prompt = edge.read_event("decoded")
                times[scheduling].append(prompt["times"][0][0] - prompt["started"])
    return {
        "pipelined_s": Spread.of(times[OURS])._asdict(),
        "lockstep_s": Spread.of(times[LOCKSTEP])._asdict(),
        "ratio": paired_ratios(times[LOCKSTEP], times[OURS])._asdict(),
    }


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


def _flood(settings: ServeSettings, report: Report) -> dict[str, float]:
    """One session of a quiet client: its tokens/s alone, and while another client floods."""
    tokens = {name: new_token() for name in ("quiet", "flood")}
    for name, token in tokens.items():
        (settings.directory / f"{name}.token").write_text(token)
    digests = {name: digest(token) for name, token in tokens.items()}
    write_settings(settings.directory / "tokens.yaml", digests)
    most_positions = (FLOOD_SESSIONS + 1) * (FLOOD_TOKENS + 64) + 2 * LONG_PROMPT
    with (
        serving(
            settings,
            tokens="tokens.yaml",
            max_sessions=FLOOD_SESSIONS + 2,
            max_cached_positions=most_positions,
        ) as address,
        connected_edges(settings, address, [5.0], token={"file": "quiet.token"}) as quiet,
    ):
        alone = [_tokens_per_s(settings, quiet[0], report, "alone")]
        with _flooding(settings, address):
            during = _tokens_per_s(settings, quiet[0], report, "while another client floods")
        alone.append(_tokens_per_s(settings, quiet[0], report, "alone again"))
    mean_alone = sum(alone) / len(alone)
    return {
        "alone_tokens_per_s": mean_alone,
        "during_tokens_per_s": during,
        "ratio": during / mean_alone,
        "fair_share": 0.5,
    }


@contextmanager
def _flooding(settings: ServeSettings, address: str) -> Iterator[None]:
    """A client of two edges that asks for far more than its share."""
    changes = {"token": {"file": "flood.token"}, "max_positions": 4096}
    with connected_edges(settings, address, [5.0, 5.0], **changes) as (decoding, prompting):
        ask(decoding, FLOOD_SESSIONS, settings.prompt_tokens, FLOOD_TOKENS)
        for _ in range(FLOOD_PROMPTS):
            ask(prompting, 1, LONG_PROMPT, 1)
        time.sleep(ARRIVES_AFTER_S)
        yield


def _tokens_per_s(settings: ServeSettings, edge: Daemon, report: Report, when: str) -> float:
    report(f"1 session at 5 ms, {when}")
    ask(edge, 1, settings.prompt_tokens, settings.tokens)
    return summarise(token_times([edge]))["aggregate_tokens_per_s"]
