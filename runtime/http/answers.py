"""Running the answers of one request: one or several, until they end or nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from starlette.types import Receive

from privatelora.errors import RequestError, UnknownModel
from privatelora.runtime.chat import TextModel
from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.generation import FinishReason, GenerationStats, TokenLogprobs
from privatelora.runtime.http.errors import CONTEXT_LENGTH_EXCEEDED, ApiError, ClientGone
from privatelora.runtime.http.metrics import EdgeMetrics
from privatelora.runtime.sampling_params import SamplingParams

T = TypeVar("T")

MAX_AT_ONCE = 4
"""Answers of one request that run at once: its others leave room for other requests."""


@dataclass
class Answer:
    """One choice of a response while it is made.

    ``prompt_text``: what to echo, if anything. ``params``: none if nothing is to be generated.
    """

    index: int
    prompt_ids: list[int]
    params: SamplingParams | None
    prompt_text: str | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    num_told: int = 0
    """Tokens whose logprobs were taken already."""

    @property
    def finish_reason(self) -> str:
        """As OpenAI calls it."""
        return self.stats.finish_reason or FinishReason.LENGTH


class Piece(NamedTuple):
    """Something new in one answer. ``text`` is None at its end."""

    answer: Answer
    text: str | None
    logprobs: Sequence[TokenLogprobs]
    """Of tokens sampled since the last piece."""


class Answers:
    """Generates answers of one edge and counts them."""

    def __init__(self, service: EdgeService, metrics: EdgeMetrics, prompt_field: str) -> None:
        """``prompt_field``: where a request has its prompt."""
        self._service = service
        self._metrics = metrics
        self._prompt_field = prompt_field

    async def stream(
        self, model: str | None, answers: Sequence[Answer]
    ) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all answers as they come; closing it cancels them.

        Raises ApiError and PrivateLoRAError.
        """
        if len(answers) == 1:
            pieces = self._one(model, answers[0])
        else:
            pieces = _merged([self._one(model, answer) for answer in answers])
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def _one(self, model: str | None, answer: Answer) -> AsyncGenerator[Piece, None]:
        text = self._service.text(model)
        self._check_length(answer)
        if answer.params is None:
            answer.stats.prompt_tokens = len(answer.prompt_ids)
            yield Piece(answer, None, ())
            return
        pieces = self._service.stream(model, answer.prompt_ids, answer.params, answer.stats)
        self._metrics.active.inc()
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield Piece(answer, piece, _new_logprobs(answer))
        except UnknownModel:
            raise
        except RequestError:
            self._check_length(answer)  # only now may the cloud have said how much it takes
            raise
        finally:
            self._metrics.active.dec()
            self._metrics.note_answer(answer.stats)
        cut = answer.stats.finish_reason is FinishReason.STOP and not _ended_itself(answer, text)
        yield Piece(answer, None, () if cut else _new_logprobs(answer))

    def _check_length(self, answer: Answer) -> None:
        room, length = self._service.max_positions, len(answer.prompt_ids)
        # A prompt that is only scored may fill the whole context.
        if length >= room + (answer.params is None):
            raise ApiError(
                f"the prompt has {length} tokens and the context holds {room}: no room is left for "
                "an answer; shorten the prompt",
                code=CONTEXT_LENGTH_EXCEEDED,
                param=self._prompt_field,
            )


def _new_logprobs(answer: Answer) -> Sequence[TokenLogprobs]:
    new = answer.stats.logprobs[answer.num_told :]
    answer.num_told += len(new)
    return new


def _ended_itself(answer: Answer, text: TextModel) -> bool:
    """Whether an end-of-sequence token ended it, rather than a stop string in its text."""
    return answer.stats.token_ids[-1:] != [] and answer.stats.token_ids[-1] in text.eos_ids


async def _merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of several answers, a few of which run at once."""
    turns = asyncio.Semaphore(MAX_AT_ONCE)
    # Bounded, so that a client that reads slowly slows the answers down.
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(2 * MAX_AT_ONCE)

    async def run(stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async with turns, aclosing(stream):
                async for piece in stream:
                    await queue.put(piece)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(run(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` for a client; cancel it and raise ClientGone if that goes away."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    if task.cancelled():
        raise ClientGone
    return task.result()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
