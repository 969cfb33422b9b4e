"""Logprobs in the two forms that OpenAI's API has."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable
from typing import Any

from privatelora.errors import ConfigError
from privatelora.runtime.chat import TextModel
from privatelora.runtime.generation import TokenLogprobs

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's API does the same."""


def chat_logprobs(text: TextModel, tokens: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
    """Entries of ``choices[].logprobs.content`` of chat completions."""
    return [
        {
            **_chat_token(text, token.token_id, token.logprob),
            "top_logprobs": [_chat_token(text, *top) for top in token.top],
        }
        for token in tokens
    ]


def _chat_token(text: TextModel, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": text.token_text(token_id),
        "logprob": _shown(logprob),
        "bytes": list(text.token_bytes(token_id)),
    }


def _shown(logprob: float) -> float:
    """As JSON has it. Raises ConfigError for what comes of logits that are no numbers."""
    if math.isnan(logprob):
        raise ConfigError(
            "the model's logprobs are not numbers: the cloud sent none, or the dtype is too narrow "
            "for the model; set dtype to bfloat16 or float32 on both sides"
        )
    return max(logprob, MIN_LOGPROB)


class CompletionLogprobs:
    """Builds ``choices[].logprobs`` of one completion, all of it or chunk by chunk."""

    def __init__(self, text: TextModel) -> None:
        self._text = text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def unscored(self, token_id: int) -> dict[str, Any]:
        """The first token of a prompt, which nothing goes before."""
        return self._columns([(token_id, None, ())])

    def of(self, tokens: Iterable[TokenLogprobs]) -> dict[str, Any]:
        """Columns for ``tokens``, which follow those of the last call."""
        return self._columns([(token.token_id, token.logprob, token.top) for token in tokens])

    def _columns(
        self, rows: list[tuple[int, float | None, tuple[tuple[int, float], ...]]]
    ) -> dict[str, Any]:
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, logprob, top in rows:
            name = self._name(token_id)
            tokens.append(name)
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._text.token_bytes(token_id)))
            if logprob is None:
                logprobs.append(None)
                tops.append(None)
                continue
            logprob = _shown(logprob)
            named = {name: logprob}
            for other_id, other in top:
                # Two tokens may read the same; the likelier one stands for both.
                other_name = self._name(other_id)
                named[other_name] = max(_shown(other), named.get(other_name, MIN_LOGPROB))
            logprobs.append(logprob)
            tops.append(named)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _name(self, token_id: int) -> str:
        """Its text, or its bytes spelt out as OpenAI does if they are no whole characters."""
        data = self._text.token_bytes(token_id)
        try:
            data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return self._text.token_text(token_id)


def joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Columns one below the other."""
    whole: dict[str, Any] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for part in parts:
        for name, column in part.items():
            whole[name] += column
    return whole
