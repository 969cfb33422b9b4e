"""Answers that are JSON of a schema: which tokens may come next.

llguidance keeps a parser of the schema's grammar and says, for every token of the vocabulary,
whether the text so far with this token behind it can still become such a document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from privatelora.errors import RequestError

# As much white space as an indented document has. Without a bound a small model, once it has
# begun with white space, likes nothing better than more of it.
WHITESPACE = r"[ \n\t]{0,32}"


class JsonConstraint:
    """The document of one answer as far as it was written."""

    def __init__(
        self,
        schema: Mapping[str, Any],
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: tuple[int, ...],
    ) -> None:
        """``vocab_size``: of the model. Raises RequestError if the schema cannot be followed."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema, allow_nan=False), overrides={"whitespace_pattern": WHITESPACE}
            )
        except (ValueError, RecursionError) as error:
            raise RequestError(
                "json_schema: it is nested too deeply, or holds what JSON has no form for"
            ) from error
        self._matcher = LLMatcher(_token_table(tokenizer, vocab_size, eos_ids), grammar)
        self._check()

    def forbidden(self) -> torch.Tensor:
        """Which tokens may not come next: bool (vocab_size,)."""
        allowed = self._matcher.compute_logit_bias()
        self._check()
        return torch.frombuffer(bytearray(allowed), dtype=torch.uint8) == 0

    def accept(self, token_id: int) -> None:
        """A token came next that was not forbidden."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise RequestError(f"json_schema: it cannot be followed: {reason[:300]}")


@lru_cache(maxsize=4)  # making one takes a second for large vocabularies
def _token_table(tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> LLTokenizer:
    return LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=list(eos_ids))
