"""A stand-in for an edge's HTTP surface, in this process, for quick tests of the chat page.

It serves the real page with its real headers, and answers as it is told.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from privatelora.runtime.http import page_files

FEATURES = 576
POINTS = 4
"""Exchanges of a step."""


@dataclass
class Stub:
    """What the edge is to do. Fields may be changed at any time, from any thread."""

    models: list[str] = field(default_factory=lambda: ["calm", "base"])
    answer: str = "A short answer."
    pieces: int | None = None
    """Stop after so many pieces and wait until the client leaves or ``go_on`` is set."""
    error: tuple[int, str, str] | None = None
    """Status, code and message instead of an answer; in its middle if ``pieces`` is set."""
    key: str | None = None
    cloud_away: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """Set when a client left in the middle of an answer."""
    go_on: threading.Event = field(default_factory=threading.Event)
    sent: list[dict[str, Any]] = field(default_factory=list)
    address: str = ""

    def reset(self) -> None:
        """As it was at first."""
        fresh = Stub(address=self.address)
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(fresh, name))

    # What the cloud received

    def record_step(self, rows: int) -> None:
        """The messages of one step."""
        self._record("StepBegin", rows, FEATURES, "int8", rows * FEATURES + 64)
        for _ in range(POINTS):
            self._record("ExchangeReply", rows, 384, "int6", rows * 300 + 24)

    def _record(self, kind: str, rows: int, features: int, codec: str, nbytes: int) -> None:
        number = len(self.sent)
        wave = [((number * 37 + i * 71) % 200 - 100) / 41 for i in range(8)]
        self.sent.append(
            {
                "number": number,
                "kind": kind,
                "time": time.time(),
                "session_id": 1,
                "rows": rows,
                "features": features,
                "codec": codec,
                "nbytes": nbytes,
                "numbers": wave,
            }
        )

    # Routes

    def refuses(self, request: Request) -> Response | None:
        """The answer to a request without the right key."""
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return problem(401, "invalid_api_key", "this edge wants an API key")

    async def list_models(self, request: Request) -> Response:
        data = [{"id": name, "object": "model", "owned_by": "you"} for name in self.models]
        return self.refuses(request) or JSONResponse({"object": "list", "data": data})

    async def status(self, request: Request) -> Response:
        connected = not self.cloud_away
        state = {
            "cloud": "tls://cloud.example:18230",
            "connected": connected,
            "problem": None if connected else "connection refused; check that the peer is running",
            "software": "privatelora/0.1.0" if connected else None,
            "rtt_ms": 18.437 if connected else None,
            "models": self.models,
            "max_positions": 2048,
            "open_conversations": 1,
            "busy_conversations": 0,
            "version": "0.1.0",
        }
        return self.refuses(request) or JSONResponse(state)

    async def what_was_sent(self, request: Request) -> Response:
        after = int(request.query_params.get("after", "-1"))
        totals: dict[str, dict[str, int]] = {}
        for message in self.sent:
            total = totals.setdefault(message["kind"], {"messages": 0, "nbytes": 0})
            total["messages"] += 1
            total["nbytes"] += message["nbytes"]
        recent = [message for message in self.sent[-256:] if message["number"] > after]
        return self.refuses(request) or JSONResponse({"totals": totals, "recent": recent})

    async def complete(self, request: Request) -> Response:
        if refusal := self.refuses(request):
            return refusal
        body = await request.json()
        self.requests.append(body)
        if self.cloud_away:
            return problem(503, "cloud_unreachable", "cannot reach tls://cloud.example:18230")
        if self.error and self.pieces is None:
            return problem(*self.error)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        pieces = [f"{word} " for word in self.answer.split(" ")]
        pieces[-1] = pieces[-1][:-1]
        prompt_tokens = sum(len(turn["content"].split()) + 4 for turn in body["messages"])
        self.record_step(prompt_tokens)
        for count, piece in enumerate(pieces):
            if count == self.pieces:
                await self._wait()
                if self.error:
                    yield event(error_body(*self.error[1:]))
                    return
            self.record_step(1)
            yield event(chunk({"content": piece}, None, prompt_tokens, count + 1))
        yield event(chunk({}, "stop", prompt_tokens, len(pieces)))
        yield "data: [DONE]\n\n"

    async def _wait(self) -> None:
        try:
            while not self.go_on.is_set():  # noqa: ASYNC110  # set from another thread
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.left.set()
            raise


def problem(status: int, code: str, message: str) -> Response:
    return JSONResponse(error_body(code, message), status)


def error_body(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def chunk(
    delta: dict[str, str], finish_reason: str | None, prompt_tokens: int, count: int
) -> dict[str, Any]:
    """One chunk of an answer, with what it took so far."""
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": count},
        "privatelora": {
            "prompt_tokens": prompt_tokens,
            "cached_tokens": 0,
            "completion_tokens": count,
            "time_to_first_token_s": 0.118,
            "prefill_tokens_per_s": 369.0,
            "decode_tokens_per_s": 44.8 if count > 1 else 0.0,
            "round_trips_per_token": 5.0 if count > 1 else 0.0,
            "bytes_to_cloud_per_token": 1936.0 if count > 1 else 0.0,
            "bytes_from_cloud_per_token": 1204.0 if count > 1 else 0.0,
        },
    }


@contextmanager
def serve(stub: Stub) -> Iterator[Stub]:
    """Serve until the context is left; ``stub.address`` is where."""
    app = Starlette(
        routes=[
            Route("/", page_files.index),
            Route("/page/{name}", page_files.file),
            Route("/v1/models", stub.list_models),
            Route("/v1/chat/completions", stub.complete, methods=["POST"]),
            Route("/v1/privatelora/status", stub.status),
            Route("/v1/privatelora/sent", stub.what_was_sent),
        ]
    )
    config = uvicorn.Config(
        app, port=0, log_level="error", ws="none", lifespan="off", loop="asyncio"
    )
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    stub.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    # A socket that listens already takes connections before the server's thread has started.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield stub
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
