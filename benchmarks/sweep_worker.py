"""The edge's end of a sweep: connects over one link after the other, and decodes.

    -> {"kind": "ours", "edge": "out/edge-3.yaml", "sessions": 1, "prompt_tokens": 8, "tokens": 24}
    -> {"kind": "replay", "cloud": "tcp://...", "impaired": {...}, "replay": {...}}
    <- {"event": "decoded", "times": [[12.31, 12.36, ...]]}
    <- {"event": "failed", "error": "..."}

Each measurement has a connection of its own, closed at its end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from privatelora.benchmarks.replay import ReplayRequest, replay
from privatelora.benchmarks.serve_worker import DecodeRequest, decode_sessions
from privatelora.cli._app import run as run_program
from privatelora.errors import PrivateLoRAError
from privatelora.runtime.link_config import ImpairedConfig


class OursRequest(DecodeRequest):
    """Decode over the product's own link, as the edge of this file of settings."""

    kind: Literal["ours"] = "ours"
    edge: Path


class OtherRequest(BaseModel):
    """Decode over a link of another kind."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["replay"] = "replay"
    cloud: str
    impaired: ImpairedConfig | None
    replay: ReplayRequest


Request = Annotated[OursRequest | OtherRequest, Field(discriminator="kind")]
_REQUEST: TypeAdapter[OursRequest | OtherRequest] = TypeAdapter(Request)


async def decode_ours(request: OursRequest) -> list[list[float]]:
    """The moments of every session's tokens."""
    from privatelora.runtime.config import load_edge_config
    from privatelora.runtime.edge import Edge

    edge = Edge(load_edge_config(request.edge))
    await edge.connect()
    try:
        return await decode_sessions(edge, request)
    finally:
        await edge.aclose()


async def decode_other(request: OtherRequest) -> list[list[float]]:
    """The moments of the tokens of the only session."""
    from privatelora.transports.base import Limits
    from privatelora.transports.impaired import impaired
    from privatelora.transports.registry import connect

    worse = request.impaired
    limits = Limits(spin_s=None if worse is None else 0.0)
    connection = await connect(request.cloud, limits)
    if worse is not None:
        up, down = worse.up.impairment(), worse.down.impairment()
        connection = impaired(connection, limits, send=up, receive=down, seed=worse.seed)
    async with connection:
        return [await replay(connection, request.replay)]


def main() -> None:
    """Serve requests until there are no more."""
    logging.getLogger("privatelora").setLevel(logging.ERROR)  # links are impaired on purpose
    from privatelora.cli._input import read_lines
    from privatelora.runtime.loop import run

    async def serve(lines: AsyncIterator[str]) -> None:
        print(json.dumps({"event": "ready"}), flush=True)
        async for line in lines:
            request = _REQUEST.validate_json(line)
            try:
                if isinstance(request, OursRequest):
                    times = await decode_ours(request)
                else:
                    times = await decode_other(request)
            except PrivateLoRAError as error:
                print(json.dumps({"event": "failed", "error": str(error)}), flush=True)
            else:
                print(json.dumps({"event": "decoded", "times": times}), flush=True)

    run(serve(read_lines()))


if __name__ == "__main__":
    run_program(main)
