"""The caches of an edge's conversations, found again by what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from privatelora.errors import CapacityError, CloudDraining, RequestError
from privatelora.runtime.generation import Context, common_prefix
from privatelora.runtime.language_model import LanguageModel
from privatelora.runtime.recovery import LOST


@dataclass(eq=False)
class _Idle:
    model: str
    context: Context
    num_prompt_tokens: int
    """Of the prompt it ran last."""


class ContextPool:
    """Lends contexts to whoever generates, and keeps them for the next turn.

    A prompt gets the context that holds the longest part of it already, if that is at least half
    of the prompt before: so it is when a conversation goes on or is tried again, not when another
    only begins with the same instructions. Else it gets a new one, in place of the one that was
    not used for longest if there are ``max_contexts``.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        max_contexts: int,
        max_waiting: int,
        patience_s: float,
    ) -> None:
        """``patience_s``: see ``Context.open``.

        Once somebody has waited so long for the cloud in vain, those who come next are told at
        once, until somebody reaches it.
        """
        self._models = models
        self._patience_s = patience_s
        self._max_contexts = max_contexts
        self._max_waiting = max_waiting
        self._turns = asyncio.Semaphore(max_contexts)
        self._num_waiting = 0
        self._is_hopeless = False
        self.num_busy = 0
        self._idle: list[_Idle] = []
        """Those not used for longest first."""

    @property
    def num_open(self) -> int:
        """Contexts that are lent or kept."""
        return self.num_busy + len(self._idle)

    @asynccontextmanager
    async def lend(self, model: str, token_ids: Seq[int]) -> AsyncIterator[Context]:
        """A context of ``model`` to run ``token_ids`` on.

        It is kept when the work is done, and freed, here and on the cloud, when that failed or was
        cancelled. Raises CapacityError if too many wait already or the cloud is full.
        """
        if self._turns.locked() and self._num_waiting >= self._max_waiting:
            raise CapacityError(
                f"this edge answers {self._max_contexts} requests already and "
                f"{self._num_waiting} wait; try again in a moment"
            )
        self._num_waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._num_waiting -= 1
        self.num_busy += 1
        try:
            async with self._one(model, token_ids) as context:
                yield context
        finally:
            self.num_busy -= 1
            self._turns.release()

    async def aclose(self) -> None:
        """Free what is kept. May be repeated."""
        while self._idle:
            await self._close_oldest()

    @asynccontextmanager
    async def _one(self, model: str, token_ids: Seq[int]) -> AsyncIterator[Context]:
        context = self._find(model, token_ids) or await self._open(model)
        context.patience_s = self._patience_now
        is_good = False
        try:
            with self._noting_hope():
                yield context
            is_good = True
        except RequestError:
            is_good = True
            raise
        finally:
            if is_good:
                self._idle.append(
                    _Idle(model, context, min(len(token_ids), len(context.token_ids)))
                )
            else:
                await context.aclose()

    @property
    def _patience_now(self) -> float:
        return 0.0 if self._is_hopeless else self._patience_s

    @contextmanager
    def _noting_hope(self) -> Iterator[None]:
        """Around what needs the cloud."""
        try:
            yield
        except LOST:
            self._is_hopeless = True
            raise
        self._is_hopeless = False

    def _find(self, model: str, token_ids: Seq[int]) -> Context | None:
        best, longest = None, 0
        for idle in self._idle:
            shared = common_prefix(idle.context.token_ids, token_ids)
            if idle.model == model and shared > longest and 2 * shared >= idle.num_prompt_tokens:
                best, longest = idle, shared
        if best is None:
            return None
        self._idle.remove(best)
        return best.context

    async def _open(self, model: str) -> Context:
        while self._idle and self.num_open > self._max_contexts:
            await self._close_oldest()
        while True:
            try:
                with self._noting_hope():
                    return await Context.open(self._models[model], patience_s=self._patience_now)
            except CloudDraining:
                raise
            except CapacityError:
                if not self._idle:
                    raise
                await self._close_oldest()  # the cloud has no room for more of this edge's

    async def _close_oldest(self) -> None:
        await self._idle.pop(0).context.aclose()
