"""From logits to the next token, on the side that owns the text."""

from __future__ import annotations

import math
import secrets
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

from privatelora.errors import ConfigError
from privatelora.runtime.sampling_params import SamplingParams

MIN_TEMPERATURE = 1e-5
"""Below it only the most likely token is left anyway, and scores would become infinite."""


class Sampler:
    """Chooses tokens for one generation; equal seeds give equal choices."""

    def __init__(self, params: SamplingParams, banned_ids: Sequence[int] = ()) -> None:
        """``banned_ids`` are never chosen."""
        self._greedy = params.temperature < MIN_TEMPERATURE
        self._banned_ids = list(banned_ids)
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
        """Next token after ``token_ids`` from its logits (vocab_size,).

        Raises ConfigError if the logits overflowed.
        """
        if not math.isfinite(logits.max()):
            raise ConfigError(
                "the model's logits are not finite numbers: its dtype is too narrow for it; set "
                "dtype to bfloat16 or float32 on both sides"
            )
        scores = logits.unsqueeze(0)
        if self._banned_ids:
            scores = scores.clone()
            scores[:, self._banned_ids] = -torch.inf
        if self._processors:
            history: Any = torch.tensor([list(token_ids)])  # stated as LongTensor over there
            scores = self._processors(history, scores)
        if self._greedy:
            return int(scores.argmax())
        probabilities = torch.softmax(scores.float().cpu(), dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
