"""An edge that carries several sessions at once, for ``privatelora-bench serve``.

    -> {"sessions": 4, "prompt_tokens": 32, "tokens": 48}
    <- {"event": "decoded", "started": 12.05, "times": [[12.31, 12.36, ...], ...]}

``times``: when each token of each session came, by this machine's monotonic clock, which all
workers share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from privatelora.cli._app import run as run_program

if TYPE_CHECKING:
    from privatelora.runtime.edge import Edge


class DecodeRequest(BaseModel):
    """How much to decode, in how many sessions at once."""

    model_config = ConfigDict(extra="forbid")

    sessions: int
    prompt_tokens: int
    tokens: int


async def decode_sessions(edge: Edge, request: DecodeRequest) -> list[list[float]]:
    """Decode in all sessions at once; the moments of every session's tokens."""
    from privatelora.runtime.generation import Context, GenerationStats, generate_tokens
    from privatelora.runtime.sampling_params import SamplingParams

    async def decode(number: int) -> list[float]:
        params = SamplingParams(max_tokens=request.tokens, ignore_eos=True)
        prompt = [100 + (7 * i + 13 * number) % 1000 for i in range(request.prompt_tokens)]
        context = await Context.open(edge.model, request.prompt_tokens + request.tokens)
        try:
            tokens = generate_tokens(context, prompt, params, edge.text.eos_ids, GenerationStats())
            return [time.monotonic() async for _ in tokens]
        finally:
            await context.aclose()

    return await asyncio.gather(*(decode(number) for number in range(request.sessions)))


def main() -> None:
    """Connect the edge of the YAML file named on the command line and serve requests."""
    from privatelora.cli._input import read_lines
    from privatelora.runtime.config import load_edge_config
    from privatelora.runtime.edge import Edge
    from privatelora.runtime.loop import run

    edge = Edge(load_edge_config(Path(sys.argv[1])))

    async def serve(lines: AsyncIterator[str]) -> None:
        await edge.connect()
        print(json.dumps({"event": "ready"}), flush=True)
        async for line in lines:
            request = DecodeRequest.model_validate_json(line)
            started = time.monotonic()
            times = await decode_sessions(edge, request)
            print(json.dumps({"event": "decoded", "started": started, "times": times}), flush=True)
        await edge.aclose()

    run(serve(read_lines()))


if __name__ == "__main__":
    run_program(main)
