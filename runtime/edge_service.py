"""What an edge offers to whoever is on this device: models by name, and their answers.

People and programs reach it through lines of JSON, HTTP or a terminal; none of these sees more
of the edge than is here.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Seq
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from privatelora.errors import RequestError, UnknownModel
from privatelora.runtime.chat import TextModel
from privatelora.runtime.context_pool import ContextPool
from privatelora.runtime.generation import GenerationStats, TokenLogprobs
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.runtime.sent_log import SentLog
from privatelora.yaml_file import explain


@dataclass(frozen=True)
class CloudStatus:
    """How it stands with the cloud. ``rtt_s``: a round trip, measured now."""

    address: str
    problem: str | None = None
    """Why it cannot be reached; the rest is empty then."""
    software: str | None = None
    rtt_s: float | None = None


class CloudProbe(Protocol):
    """What a service asks of its edge's connection."""

    @property
    def sent(self) -> SentLog:
        """What was sent to the cloud."""

    @property
    def max_positions(self) -> int:
        """Longest sequence on offer now."""

    async def probe(self) -> CloudStatus:
        """Connect if there is no connection, and measure a round trip; never raises."""


@dataclass(frozen=True)
class EdgeStatus:
    """What an edge is doing. ``rtt_ms``: of the link to the cloud, measured now."""

    cloud: str
    connected: bool
    problem: str | None
    """Why it is not connected."""
    software: str | None
    """What the cloud says it runs."""
    rtt_ms: float | None
    models: tuple[str, ...]
    max_positions: int
    open_conversations: int
    """Those that have a session on the cloud."""
    busy_conversations: int
    """Those that answer now."""


class EdgeService:
    """Answers of one edge's models, many at a time."""

    def __init__(
        self,
        texts: Mapping[str, TextModel],
        cloud: CloudProbe,
        *,
        defaults: SamplingParams,
        system_prompt: str | None,
        max_conversations: int,
        max_waiting: int,
        patience_s: float = 0.0,
    ) -> None:
        """``texts``: the models by name, the default first, at least one.

        ``patience_s``: how long an answer under way waits for a cloud that was lost.
        """
        self.models = tuple(texts)
        self.default_model = self.models[0]
        self.defaults = defaults
        self.system_prompt = system_prompt
        """Goes before a conversation that has none of its own."""
        self.started_at = time.time()
        """Unix, in seconds."""
        self._texts = texts
        self._cloud = cloud
        models = {name: text.model for name, text in texts.items()}
        self._contexts = ContextPool(models, max_conversations, max_waiting, patience_s)

    @property
    def sent(self) -> SentLog:
        """What the cloud received."""
        return self._cloud.sent

    @property
    def max_positions(self) -> int:
        """Longest conversation on offer now: prompt and answer together."""
        return self._cloud.max_positions

    def text(self, model: str | None = None) -> TextModel:
        """A model by name, or the default; UnknownModel if there is none of that name."""
        return self._texts[self._name(model)]

    def params(self, overrides: Mapping[str, Any]) -> SamplingParams:
        """The edge's defaults with ``overrides``; RequestError names what is wrong with them."""
        try:
            return SamplingParams.model_validate({**self.defaults.model_dump(), **overrides})
        except ValidationError as error:
            raise RequestError(f"sampling: {explain(error, SamplingParams)}") from error

    async def stream(
        self,
        model: str | None,
        prompt_ids: Seq[int],
        params: SamplingParams,
        stats: GenerationStats,
    ) -> AsyncGenerator[str, None]:
        """Yield the answer's text as it becomes certain.

        What a conversation has cached is found again by its tokens. Closing the iterator, or
        cancelling who iterates, cancels the answer and frees its session on the cloud. Raises
        UnknownModel, RequestError, CapacityError, and what the link to the cloud raises.
        """
        name = self._name(model)
        async with self._contexts.lend(name, prompt_ids) as context:
            pieces = self._texts[name].stream(context, prompt_ids, params, stats)
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece

    async def score(self, model: str | None, token_ids: Seq[int], top: int) -> list[TokenLogprobs]:
        """How likely each of ``token_ids`` but the first is, given all before it.

        ``top``: most likely tokens to name beside each. Raises as ``stream``.
        """
        async with self._contexts.lend(self._name(model), token_ids) as context:
            return await context.score(token_ids, top)

    async def status(self) -> EdgeStatus:
        """What it is doing; connects if it is not connected, and never raises."""
        cloud = await self._cloud.probe()
        return EdgeStatus(
            cloud=cloud.address,
            connected=cloud.problem is None,
            problem=cloud.problem,
            software=cloud.software,
            rtt_ms=None if cloud.rtt_s is None else round(cloud.rtt_s * 1e3, 3),
            models=self.models,
            max_positions=self.max_positions,
            open_conversations=self._contexts.num_open,
            busy_conversations=self._contexts.num_busy,
        )

    async def aclose(self) -> None:
        """Free what conversations have cached. May be repeated."""
        await self._contexts.aclose()

    def _name(self, model: str | None) -> str:
        name = self.default_model if model is None else model
        if name not in self._texts:
            raise UnknownModel(
                f"there is no model {name[:80]!r} here; choose from {', '.join(self.models)}"
            )
        return name
