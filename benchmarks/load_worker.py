"""The working edge of ``privatelora-bench load``: its sessions decode all along.

    python -m privatelora.benchmarks.load_worker EDGE.yaml SESSIONS PROMPT_TOKENS TOKENS
    <- {"event": "ready"}
    -> {"seconds": 4.0}
    <- {"event": "counted", "tokens": 163.2, "seconds": 4.0, "largest_gap_ms": 31.0}

Each session gives one answer of TOKENS after the other to the same prompt, which stays cached.
Tokens count by parts: one that was under way at either end of the time counts by its share in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from privatelora.cli._app import run as run_program

MAX_LATE_S = 60.0
"""A session whose next token takes longer has made nothing of it in the time that counts."""


class CountRequest(BaseModel):
    """How long to count for."""

    model_config = ConfigDict(extra="forbid")

    seconds: float


class Tally:
    """The moments of one session's tokens, in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._moments: list[float] = []
        self._came = asyncio.Event()

    def note(self, moment: float) -> None:
        """A token has come."""
        self._moments.append(moment)
        self._came.set()

    async def wait_past(self, moment: float) -> None:
        """Return when a token has come after ``moment``."""
        while not self._moments or self._moments[-1] <= moment:
            self._came.clear()
            await self._came.wait()

    def count(self, start: float, end: float) -> tuple[float, float]:
        """Tokens between two moments and the largest gap in seconds; forget what came before."""
        kept = next((i for i, moment in enumerate(self._moments) if moment > start), None)
        if kept is not None:
            del self._moments[: max(0, kept - 1)]
        return tokens_between(self._moments, start, end)


def tokens_between(moments: Sequence[float], start: float, end: float) -> tuple[float, float]:
    """Tokens, by parts, and the largest gap that touches the time from ``start`` to ``end``.

    ``moments``: of tokens, ascending. A token is in the making since the one before it.
    """
    tokens, largest_gap = 0.0, 0.0
    for before, after in itertools.pairwise(moments):
        shared = min(after, end) - max(before, start)
        if shared > 0:
            tokens += shared / (after - before)
            largest_gap = max(largest_gap, after - before)
    return tokens, largest_gap


def main() -> None:
    """Connect the edge of the YAML file named on the command line, decode, and count."""
    from privatelora.cli._input import read_lines
    from privatelora.runtime.config import load_edge_config
    from privatelora.runtime.edge import Edge
    from privatelora.runtime.generation import Context, GenerationStats, generate_tokens
    from privatelora.runtime.loop import run
    from privatelora.runtime.sampling_params import SamplingParams

    edge = Edge(load_edge_config(Path(sys.argv[1])))
    num_sessions, prompt_tokens, num_tokens = map(int, sys.argv[2:])
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)

    async def decode(number: int, tally: Tally) -> None:
        prompt = [1 + (7 * i + 13 * number) % 97 for i in range(prompt_tokens)]
        context = await Context.open(edge.model, prompt_tokens + num_tokens)
        while True:
            answer = generate_tokens(context, prompt, params, edge.text.eos_ids, GenerationStats())
            async for _ in answer:
                tally.note(time.monotonic())

    async def count(tallies: Sequence[Tally], seconds: float) -> dict[str, object]:
        start = time.monotonic()
        await asyncio.sleep(seconds)
        end = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_LATE_S):
                for tally in tallies:
                    await tally.wait_past(end)
        counted = [tally.count(start, end) for tally in tallies]
        return {
            "event": "counted",
            "tokens": sum(tokens for tokens, _ in counted),
            "seconds": end - start,
            "largest_gap_ms": max(gap for _, gap in counted) * 1e3,
        }

    async def serve(lines: AsyncIterator[str]) -> None:
        await edge.connect()
        tallies = [Tally() for _ in range(num_sessions)]
        async with asyncio.TaskGroup() as group:
            sessions = [
                group.create_task(decode(number, tally)) for number, tally in enumerate(tallies)
            ]
            for tally in tallies:
                await tally.wait_past(0.0)
            print(json.dumps({"event": "ready"}), flush=True)
            async for line in lines:
                request = CountRequest.model_validate_json(line)
                print(json.dumps(await count(tallies, request.seconds)), flush=True)
            for session in sessions:
                session.cancel()
        await edge.aclose()

    run(serve(read_lines()))


if __name__ == "__main__":
    run_program(main)
