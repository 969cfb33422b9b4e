"""The generation loop: prefill what is new, then sample a token at a time.

It runs on the edge and drives any ``Sequence``, split or not, so both are measured and tested
by the same code.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from collections.abc import Sequence as Seq
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TypeVar

import torch
from tokenizers import Tokenizer

from privatelora.errors import (
    CapacityError,
    ProtocolError,
    RequestError,
    SessionEvicted,
)
from privatelora.runtime.json_constraint import JsonConstraint
from privatelora.runtime.language_model import LanguageModel, Sequence, Traffic
from privatelora.runtime.recovery import LOST, recover
from privatelora.runtime.sampler import Sampler
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.runtime.text import TextStream

logger = logging.getLogger(__name__)

T = TypeVar("T")


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model itself finds a token: penalties, bias and temperature left out.

    ``logprob``: natural logarithm. ``top``: (token id, logprob) of the most likely, descending.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class GenerationStats:
    """What one generation took. Times in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were in the cache already."""
    completion_tokens: int = 0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0
    """From the first token to the last."""
    finish_reason: FinishReason | None = None
    prefill_traffic: Traffic = field(default_factory=Traffic)
    """Up to the first token."""
    decode_traffic: Traffic = field(default_factory=Traffic)
    """After it."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each token that was sampled, end-of-sequence excluded, if the parameters ask for them."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """New prompt tokens per second until the first token."""
        new = self.prompt_tokens - self.cached_tokens
        return new / self.time_to_first_token_s if self.time_to_first_token_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s else 0.0


class Context:
    """A sequence together with the tokens its cache holds, so that only new ones are run.

    A cache that the cloud needed elsewhere, or that was lost with the link to it, is rebuilt from
    those tokens when it is needed again, as far as the cloud does not have it any more.
    """

    def __init__(
        self, model: LanguageModel, sequence: Sequence, max_positions: int, patience_s: float
    ) -> None:
        self._model = model
        self.patience_s = patience_s
        self._sequence = sequence
        self.max_positions = max_positions
        self.token_ids: list[int] = []

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return self._model.config.vocab_size

    @property
    def traffic(self) -> Traffic:
        """What the sequence sent and got up to now."""
        return self._sequence.traffic

    @classmethod
    async def open(
        cls, model: LanguageModel, max_positions: int | None = None, patience_s: float = 0.0
    ) -> Context:
        """Open a sequence of ``max_positions`` (default: all the model offers).

        ``patience_s``: how long it waits for a cloud that is lost, now or while it is advanced.
        """
        opening = partial(model.open_sequence, max_positions or model.max_positions)
        try:
            sequence = await opening()
        except (ProtocolError, *LOST) as error:
            sequence = await recover(opening, error, patience_s)
        max_positions = max_positions or model.max_positions
        # What a model offers may only be known once its other half was reached.
        max_positions = min(max_positions, model.max_positions)
        return cls(model, sequence, max_positions, patience_s)

    async def advance(self, token_ids: Seq[int]) -> torch.Tensor:
        """Make the cache hold exactly ``token_ids``; logits (vocab_size,) after the last.

        Runs only what differs from the cache, the last token at least.
        """
        return await self._rebuilding(self._advance, token_ids)

    async def score(self, token_ids: Seq[int], top: int) -> list[TokenLogprobs]:
        """How likely each of ``token_ids`` but the first is, given all before it.

        ``top``: most likely tokens to name beside each. Runs all of them, whatever is cached.
        """

        async def score_all(token_ids: Seq[int]) -> list[TokenLogprobs]:
            self.token_ids.clear()
            scored: list[TokenLogprobs] = []
            async with aclosing(self._run(token_ids, 0, all_rows=True)) as steps:
                async for logits in steps:
                    next_ids = token_ids[len(scored) + 1 : len(scored) + 1 + len(logits)]
                    scored += token_logprobs(logits[: len(next_ids)], next_ids, top)
            return scored

        return await self._rebuilding(score_all, token_ids)

    async def _rebuilding(self, run: Callable[[Seq[int]], Awaitable[T]], token_ids: Seq[int]) -> T:
        async def run_again() -> T:
            # What was run and what the cloud still has of it: both go back to the shorter.
            del self.token_ids[await self._sequence.reopen() :]
            return await run(token_ids)

        try:
            return await (run(token_ids) if self._sequence.is_open else run_again())
        except (SessionEvicted, ProtocolError, *LOST) as error:
            return await recover(run_again, error, self.patience_s)
        except (RuntimeError, MemoryError) as error:  # torch reports exhausted memory as either
            logger.exception("running %d tokens failed", len(token_ids))
            raise CapacityError(
                f"this device could not compute: {error}; close other conversations or programs, "
                "or try a shorter one"
            ) from error

    async def _advance(self, token_ids: Seq[int]) -> torch.Tensor:
        start = min(common_prefix(self.token_ids, token_ids), len(token_ids) - 1)
        # A step that fails half-way leaves the cache good up to the last one that did not.
        del self.token_ids[start:]
        async with aclosing(self._run(token_ids, start)) as steps:
            *_, logits = [logits async for logits in steps]
        return logits[0]

    async def _run(
        self, token_ids: Seq[int], start: int, *, all_rows: bool = False
    ) -> AsyncGenerator[torch.Tensor, None]:
        """Run what follows ``start`` in steps that suit the model, and yield their logits."""
        if len(token_ids) > self.max_positions:
            raise RequestError(
                f"{len(token_ids)} tokens do not fit the context of {self.max_positions}; "
                "shorten the prompt"
            )
        size = self._model.max_step_positions
        chunks = [token_ids[i : i + size] for i in range(start, len(token_ids), size)]
        running = self._sequence.forward_chunks(chunks, start, all_rows=all_rows)
        async with aclosing(running) as steps:
            for chunk in chunks:
                logits = await anext(steps)
                self.token_ids.extend(chunk)
                yield logits

    async def aclose(self) -> None:
        """Free the sequence."""
        await self._sequence.aclose()


async def generate_tokens(
    context: Context,
    prompt_ids: Seq[int],
    params: SamplingParams,
    eos_ids: Seq[int],
    stats: GenerationStats,
    constraint: JsonConstraint | None = None,
) -> AsyncGenerator[int, None]:
    """Yield sampled tokens, the end-of-sequence token excluded.

    ``constraint`` says what the answer may be; it also says when it ends, whatever ``ignore_eos``
    does. Closing the iterator cancels: the context stays usable, its cache intact up to the last
    finished step. Raises RequestError if the prompt leaves no room for an answer.
    """
    if not prompt_ids:
        raise RequestError("the prompt is empty")
    if len(prompt_ids) >= context.max_positions:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens and the context holds "
            f"{context.max_positions}: no room is left for an answer; shorten the prompt"
        )
    banned_ids = eos_ids if params.ignore_eos and constraint is None else ()
    sampler = Sampler(params, len(prompt_ids), banned_ids, constraint)
    token_ids = list(prompt_ids)
    stats.prompt_tokens = len(token_ids)
    stats.cached_tokens = min(common_prefix(context.token_ids, token_ids), len(token_ids) - 1)
    room = min(params.max_tokens, context.max_positions - len(token_ids))
    before = context.traffic
    started = first_at = time.perf_counter()
    for count in range(1, room + 1):
        logits = await context.advance(token_ids)
        token_id = sampler.choose(logits, token_ids)
        now = time.perf_counter()
        if count == 1:
            stats.time_to_first_token_s, first_at = now - started, now
            first_traffic = context.traffic
            stats.prefill_traffic = first_traffic.since(before)
        stats.decode_s = now - first_at
        stats.decode_traffic = context.traffic.since(first_traffic)
        stats.completion_tokens = count
        stats.token_ids.append(token_id)
        if token_id in eos_ids:
            stats.finish_reason = FinishReason.STOP
            return
        token_ids.append(token_id)
        if params.logprobs is not None:
            stats.logprobs += token_logprobs(logits[None], [token_id], params.logprobs)
        yield token_id
    stats.finish_reason = FinishReason.LENGTH


async def generate_text(
    context: Context,
    tokenizer: Tokenizer,
    prompt_ids: Seq[int],
    params: SamplingParams,
    eos_ids: Seq[int],
    stats: GenerationStats,
) -> AsyncGenerator[str, None]:
    """Yield pieces of the answer's text as they become certain; see ``generate_tokens``."""
    text = TextStream(tokenizer, params.stop)
    constraint = None
    if params.json_schema is not None:
        constraint = JsonConstraint(
            params.json_schema, tokenizer, context.vocab_size, tuple(eos_ids)
        )
    tokens = generate_tokens(context, prompt_ids, params, eos_ids, stats, constraint)
    try:
        async for token_id in tokens:
            if piece := text.push(token_id):
                yield piece
            if text.stopped:
                stats.finish_reason = FinishReason.STOP
                return
        if piece := text.flush():
            yield piece
    finally:
        # Without this an abandoned inner iterator is finalised by the garbage collector, late.
        await tokens.aclose()


@torch.inference_mode()
def token_logprobs(logits: torch.Tensor, token_ids: Seq[int], top: int) -> list[TokenLogprobs]:
    """How likely ``token_ids`` are, by logits (len(token_ids), vocab_size)."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, dtype=torch.int64)[:, None])[:, 0]
    values, ids = logprobs.topk(top, dim=-1)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(best_ids, best, strict=True)))
        for token_id, logprob, best_ids, best in zip(
            token_ids, chosen.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """Number of leading tokens that two sequences share."""
    longest = min(len(a), len(b))
    if a[:longest] == b[:longest]:  # the usual case, compared without a Python loop
        return longest
    return next((i for i in range(longest) if a[i] != b[i]), longest)
