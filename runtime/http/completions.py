"""``/v1/completions``: plain text to be continued, or to be scored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from privatelora.runtime.chat import TextModel
from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.generation import TokenLogprobs
from privatelora.runtime.http.answers import Answer, Answers
from privatelora.runtime.http.errors import ApiError, json_bytes
from privatelora.runtime.http.logprobs import CompletionLogprobs, joined
from privatelora.runtime.http.metrics import EdgeMetrics
from privatelora.runtime.http.params import for_choice, sampling_params
from privatelora.runtime.http.schemas import CompletionRequest
from privatelora.runtime.http.streaming import event
from privatelora.runtime.http.usage import cost


class Completion:
    """One request and the response to it."""

    def __init__(
        self, service: EdgeService, metrics: EdgeMetrics, request: CompletionRequest
    ) -> None:
        """Raises ApiError and RequestError if the request cannot be served as asked."""
        self._request = request
        self._service = service
        self._model = request.model or service.default_model
        self._text: TextModel = service.text(self._model)
        self._answers = Answers(service, metrics, "prompt")
        params = None
        if request.max_tokens != 0:
            params = sampling_params(
                service, request, max_tokens=request.max_tokens, logprobs=request.logprobs
            )
        self._choices: list[Answer] = []
        for prompt in request.prompt:
            prompt_ids = self._prompt_ids(prompt)
            prompt_text = prompt if isinstance(prompt, str) else self._text.decode(prompt_ids)
            for number in range(request.num_choices):
                self._choices.append(
                    Answer(
                        len(self._choices),
                        prompt_ids,
                        None if params is None else for_choice(params, number),
                        prompt_text if request.echo else None,
                    )
                )
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._model,
        }

    async def whole(self) -> dict[str, Any]:
        """The response in one piece."""
        texts = [[answer.prompt_text or ""] for answer in self._choices]
        sampled: list[list[TokenLogprobs]] = [[] for _ in self._choices]
        async with aclosing(self._answers.stream(self._model, self._choices)) as pieces:
            async for answer, text, new in pieces:
                texts[answer.index].append(text or "")
                sampled[answer.index] += new
        logprobs = [
            await self._logprobs(answer, tokens)
            for answer, tokens in zip(self._choices, sampled, strict=True)
        ]
        return {
            **self._head,
            "choices": [
                _choice(answer.index, "".join(text), columns, answer.finish_reason)
                for answer, text, columns in zip(self._choices, texts, logprobs, strict=True)
            ],
            **self._cost(),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The response as events."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        continuous = with_usage and options is not None and bool(options.continuous_usage_stats)
        # What all chunks share is written once: a token costs little more than its text.
        opening = json_bytes(self._head)[:-1] + b',"choices":['
        closing = b'],"usage":null}' if with_usage else b"]}"

        def chunk(choice: dict[str, Any]) -> bytes:
            end = b"]," + json_bytes(self._cost())[1:] if continuous else closing
            return event(opening + json_bytes(choice) + end)

        columns = [CompletionLogprobs(self._text) for _ in self._choices]
        echoed: set[int] = set()
        async with aclosing(self._answers.stream(self._model, self._choices)) as pieces:
            async for answer, text, new in pieces:
                index, data = answer.index, b""
                if answer.prompt_text is not None and index not in echoed:
                    echoed.add(index)
                    of_prompt = await self._prompt_logprobs(answer, columns[index])
                    data = chunk(_choice(index, answer.prompt_text, of_prompt))
                finish_reason = answer.finish_reason if text is None else None
                wanted = self._request.logprobs is not None
                logprobs = columns[index].of(new) if wanted else None
                yield data + chunk(_choice(index, text or "", logprobs, finish_reason))
        if with_usage:
            yield event(json_bytes({**self._head, "choices": [], **self._cost()}))

    async def _logprobs(
        self, answer: Answer, sampled: list[TokenLogprobs]
    ) -> dict[str, Any] | None:
        """Of the answer's tokens, and before them of the prompt's if that is echoed.

        With the prompt goes every token that was sampled, an end-of-sequence token as well: who
        scores a prompt counts on as many tokens behind it as there were.
        """
        top = self._request.logprobs
        if top is None:
            return None
        columns = CompletionLogprobs(self._text)
        if answer.prompt_text is None:
            return columns.of(sampled)
        token_ids = [*answer.prompt_ids, *answer.stats.token_ids]
        scored = await self._service.score(self._model, token_ids, top)
        return joined([columns.unscored(token_ids[0]), columns.of(scored)])

    async def _prompt_logprobs(
        self, answer: Answer, columns: CompletionLogprobs
    ) -> dict[str, Any] | None:
        top = self._request.logprobs
        if top is None:
            return None
        scored = await self._service.score(self._model, answer.prompt_ids, top)
        return joined([columns.unscored(answer.prompt_ids[0]), columns.of(scored)])

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            prompt = self._text.encode_prompt(prompt)
        size = self._text.model.config.vocab_size
        if any(token_id >= size for token_id in prompt):
            raise ApiError(
                f"prompt: token ids lie in 0 to {size - 1}", param="prompt", code="invalid_value"
            )
        if not prompt:
            raise ApiError("prompt: it has no tokens", param="prompt", code="invalid_value")
        return prompt

    def _cost(self) -> dict[str, Any]:
        return cost(self._choices, self._request.num_choices)


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
