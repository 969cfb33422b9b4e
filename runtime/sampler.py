"""From logits to the next token, on the side that owns the text."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from privatelora.errors import ConfigError, RequestError
from privatelora.runtime.json_constraint import JsonConstraint
from privatelora.runtime.sampling_params import SamplingParams

MIN_TEMPERATURE = 1e-5
"""Below it only the most likely token is left anyway, and scores would become infinite."""


class Sampler:
    """Chooses tokens for one generation; equal seeds give equal choices."""

    def __init__(
        self,
        params: SamplingParams,
        num_prompt_tokens: int = 0,
        banned_ids: Sequence[int] = (),
        constraint: JsonConstraint | None = None,
    ) -> None:
        """``banned_ids`` are never chosen, nor what ``constraint`` forbids."""
        self._constraint = constraint
        self._greedy = params.temperature < MIN_TEMPERATURE
        self._num_prompt_tokens = num_prompt_tokens
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._counts: Counter[int] = Counter()
        """Of the tokens of the answer."""
        self._bias = {**params.logit_bias, **dict.fromkeys(banned_ids, -torch.inf)}
        self._processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        self._generator = torch.Generator()
        if not self._greedy:
            seed = params.seed if params.seed is not None else secrets.randbits(63)
            self._generator.manual_seed(seed)
            self._processors.append(TemperatureLogitsWarper(params.temperature))
            if params.top_k:
                self._processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(params.top_p))
            if params.min_p > 0.0:
                self._processors.append(MinPLogitsWarper(params.min_p))

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        """Next token after ``token_ids``, prompt and answer, from its logits (vocab_size,).

        Raises ConfigError if the logits overflowed, RequestError for a bias of no token and for a
        schema that turns out to be too much.
        """
        if not math.isfinite(logits.max()):
            raise ConfigError(
                "the model's logits are not finite numbers: its dtype is too narrow for it; set "
                "dtype to bfloat16 or float32 on both sides"
            )
        scores = self._biased(logits, token_ids)
        if self._constraint is not None:
            scores = scores.masked_fill(self._constraint.forbidden(), -torch.inf)
        token_id = self._choose(scores.unsqueeze(0), token_ids)
        if self._constraint is not None:
            self._constraint.accept(token_id)
        return token_id

    def _choose(self, scores: torch.Tensor, token_ids: Sequence[int]) -> int:
        if self._processors:
            history: Any = torch.tensor([list(token_ids)])  # stated as LongTensor over there
            scores = self._processors(history, scores)
        if self._greedy:
            return int(scores.argmax())
        probabilities = torch.softmax(scores.float().cpu(), dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _biased(self, logits: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits with what was asked to be added to or taken off single tokens.

        Penalties as OpenAI's API reference defines them.
        """
        changes = dict(self._bias)
        if changes and not 0 <= min(changes) <= max(changes) < len(logits):
            raise RequestError(f"logit_bias: token ids lie in 0 to {len(logits) - 1}")
        if self._presence or self._frequency:
            self._counts.update(token_ids[self._num_prompt_tokens + self._counts.total() :])
            for token_id, count in self._counts.items():
                penalty = self._presence + self._frequency * count
                changes[token_id] = changes.get(token_id, 0.0) - penalty
        if not changes:
            return logits
        biased = logits.clone()
        biased[list(changes)] += torch.tensor(list(changes.values()))
        return biased
