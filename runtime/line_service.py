"""The edge as a local service over lines of JSON: one request a line in, events out.

    -> {"messages": [{"role": "user", "content": "Hi"}], "sampling": {"max_tokens": 64}}
    <- {"event": "text", "text": "Hel"}
    <- {"event": "done", "text": "Hello!", "finish_reason": "stop", "figures": {...}}

A request has ``messages`` or a plain ``prompt``; ``model`` names one of the edge's models;
``sampling`` overrides the edge's defaults; ``id`` comes back with every event. A request that
cannot be served gets ``{"event": "error", ...}`` and the service goes on.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privatelora.errors import PrivateLoRAError, RequestError
from privatelora.runtime.chat import ChatMessage
from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.figures import figures
from privatelora.runtime.generation import GenerationStats
from privatelora.yaml_file import explain

MAX_LINE_CHARS = 4 * 2**20


class LineMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class LineRequest(BaseModel):
    """One line of input."""

    model_config = ConfigDict(extra="forbid")

    id: str | int | None = None
    messages: list[LineMessage] | None = Field(default=None, min_length=1)
    prompt: str | None = None
    model: str | None = None
    sampling: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_two(self) -> LineRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or prompt")
        return self


class LineService:
    """Answers requests one after the other."""

    def __init__(self, service: EdgeService) -> None:
        self._service = service

    async def run(self, lines: AsyncIterator[str], emit: Callable[[dict[str, Any]], None]) -> None:
        """Serve until ``lines`` ends; ``emit`` gets every event."""
        async for line in lines:
            if line.strip():
                await self._answer(line, emit)

    async def _answer(self, line: str, emit: Callable[[dict[str, Any]], None]) -> None:
        tag: dict[str, Any] = {}
        try:
            values = _read(line)
            tag = _tag(values)
            request = _checked(values)
            params = self._service.params(request.sampling)
            prompt_ids = self._prompt_ids(request)
            stats = GenerationStats()
            pieces = []
            async for piece in self._service.stream(request.model, prompt_ids, params, stats):
                pieces.append(piece)
                emit({**tag, "event": "text", "text": piece})
        except PrivateLoRAError as error:
            emit({**tag, "event": "error", "kind": type(error).__name__, "error": str(error)})
            return
        emit(
            {
                **tag,
                "event": "done",
                "text": "".join(pieces),
                "finish_reason": stats.finish_reason,
                "figures": figures(stats),
            }
        )

    def _prompt_ids(self, request: LineRequest) -> list[int]:
        text, system_prompt = self._service.text(request.model), self._service.system_prompt
        if request.prompt is not None:
            return text.encode_prompt(request.prompt)
        messages: list[ChatMessage] = [
            {"role": turn.role, "content": turn.content} for turn in request.messages or []
        ]
        if system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
        return text.encode_chat(messages)


def _read(line: str) -> Any:
    if len(line) > MAX_LINE_CHARS:
        raise RequestError(f"a request line may have {MAX_LINE_CHARS} characters at most")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a number with too many digits: ValueError
        raise RequestError(f"not a line of JSON: {error}") from error


def _tag(values: Any) -> dict[str, Any]:
    """What marks the events of a request as its own, even if the request is refused."""
    tag = values.get("id") if isinstance(values, dict) else None
    return {"id": tag} if isinstance(tag, str | int) else {}


def _checked(values: Any) -> LineRequest:
    try:
        return LineRequest.model_validate(values)
    except ValidationError as error:
        raise RequestError(explain(error, LineRequest)) from error
