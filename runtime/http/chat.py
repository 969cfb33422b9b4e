"""``/v1/chat/completions``."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from privatelora.runtime.chat import ChatMessage, TextModel
from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.http.answers import Answer, Answers, Piece
from privatelora.runtime.http.errors import json_bytes
from privatelora.runtime.http.logprobs import chat_logprobs
from privatelora.runtime.http.metrics import EdgeMetrics
from privatelora.runtime.http.params import for_choice, sampling_params
from privatelora.runtime.http.schemas import ChatRequest
from privatelora.runtime.http.streaming import event
from privatelora.runtime.http.usage import cost


class ChatCompletion:
    """One request and the response to it."""

    def __init__(self, service: EdgeService, metrics: EdgeMetrics, request: ChatRequest) -> None:
        """Raises ApiError and RequestError if the request cannot be served as asked."""
        self._request = request
        self._model = request.model or service.default_model
        self._text: TextModel = service.text(self._model)
        self._answers = Answers(service, metrics, "messages")
        params = sampling_params(
            service,
            request,
            max_tokens=request.max_completion_tokens or request.max_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
        prompt_ids = self._text.encode_chat(_messages(request, service.system_prompt))
        self._choices = [
            Answer(index, prompt_ids, for_choice(params, index))
            for index in range(request.num_choices)
        ]
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}

    async def whole(self) -> dict[str, Any]:
        """The response in one piece."""
        texts: dict[int, list[str]] = {answer.index: [] for answer in self._choices}
        entries: dict[int, list[Any]] = {answer.index: [] for answer in self._choices}
        async with aclosing(self._answers.stream(self._model, self._choices)) as pieces:
            async for answer, text, logprobs in pieces:
                texts[answer.index].append(text or "")
                entries[answer.index] += chat_logprobs(self._text, logprobs)
        return {
            **self._head,
            "object": "chat.completion",
            "model": self._model,
            "choices": [
                {
                    "index": answer.index,
                    "message": {
                        "role": "assistant",
                        "content": "".join(texts[answer.index]),
                        "refusal": None,
                    },
                    "logprobs": self._logprobs(entries[answer.index]),
                    "finish_reason": answer.finish_reason,
                }
                for answer in self._choices
            ],
            **self._cost(),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The response as events."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        continuous = with_usage and options is not None and bool(options.continuous_usage_stats)
        # What all chunks share is written once: a token costs little more than its text.
        head = {**self._head, "object": "chat.completion.chunk", "model": self._model}
        opening = json_bytes(head)[:-1] + b',"choices":['
        closing = b'],"usage":null}' if with_usage else b"]}"

        def chunk(choice: bytes) -> bytes:
            end = b"]," + json_bytes(self._cost())[1:] if continuous else closing
            return event(opening + choice + end)

        begun: set[int] = set()
        async with aclosing(self._answers.stream(self._model, self._choices)) as pieces:
            async for piece in pieces:
                index = piece.answer.index
                data = b""
                if index not in begun:
                    begun.add(index)
                    data = chunk(_choice(index, {"role": "assistant", "content": ""}))
                if piece.text is not None or piece.logprobs:
                    data += chunk(self._choice_of(piece))
                if piece.text is None:
                    data += chunk(_choice(index, {}, finish_reason=piece.answer.finish_reason))
                yield data
        if with_usage:
            yield event(json_bytes({**head, "choices": [], **self._cost()}))

    def _choice_of(self, piece: Piece) -> bytes:
        logprobs = self._logprobs(chat_logprobs(self._text, piece.logprobs))
        return _choice(piece.answer.index, {"content": piece.text or ""}, logprobs)

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": entries, "refusal": None} if self._request.logprobs else None

    def _cost(self) -> dict[str, Any]:
        return cost(self._choices, len(self._choices))


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> bytes:
    return json_bytes(
        {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    )


def _messages(request: ChatRequest, system_prompt: str | None) -> list[ChatMessage]:
    """Turns as the chat template knows them, the edge's own instructions first if none came."""
    messages: list[ChatMessage] = [
        {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text}
        for turn in request.messages
    ]
    if system_prompt is not None and all(turn["role"] != "system" for turn in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages
