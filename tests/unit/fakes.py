"""A language model without numbers: what it says is written down beforehand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import torch

from privatelora.errors import CapacityError, PrivateLoRAError, RequestError
from privatelora.partition.models.config import DecoderConfig
from privatelora.runtime.chat import TextModel
from privatelora.runtime.edge_service import CloudStatus, EdgeService
from privatelora.runtime.language_model import LanguageModel, Rows, Traffic, rows_of_chunk
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.runtime.sent_log import SentLog
from tests.partition.tiny import tiny_tokenizer
from tests.unit.world import world


class FakeCloud:
    """The connection of an edge that needs none."""

    sent = SentLog()
    max_positions = 64

    async def probe(self) -> CloudStatus:
        return CloudStatus("inproc://fake", software="fake", rtt_s=0.001)


def fake_service(
    *models: LanguageModel,
    system_prompt: str | None = None,
    max_conversations: int = 4,
    max_waiting: int = 4,
    patience_s: float = 0.0,
    **defaults: Any,
) -> EdgeService:
    """An edge's service of models named 0, 1, ... with the tiny tokenizer."""
    texts = {str(number): TextModel(model, tiny_tokenizer()) for number, model in enumerate(models)}
    return EdgeService(
        texts,
        FakeCloud(),
        defaults=SamplingParams(**defaults),
        system_prompt=system_prompt,
        max_conversations=max_conversations,
        max_waiting=max_waiting,
        patience_s=patience_s,
    )


Continuation = Callable[[list[int]], int]
"""From all tokens so far to the next."""


def count_up(token_ids: list[int]) -> int:
    """Each token is one more than the last."""
    return token_ids[-1] + 1


class FakeSequence:
    """Records every step, and insists on being called as a real sequence has to be."""

    def __init__(self, model: FakeModel, max_positions: int) -> None:
        self._model = model
        self._max_positions = max_positions
        self.cached: list[int] = []
        self.closed = False
        self.lost = False
        self.traffic = Traffic()

    async def forward(self, token_ids: Seq[int], position: int, rows: Rows) -> torch.Tensor:
        model = self._model
        assert self.is_open
        assert 0 < len(token_ids) <= model.max_step_positions
        assert position <= len(self.cached), "a gap"
        assert position + len(token_ids) <= self._max_positions
        model.steps.append((list(token_ids), position, rows))
        del self.cached[position:]
        if model.failures:
            # It may have got anywhere before it failed.
            self.cached.extend(token_ids[: len(token_ids) // 2])
            self.lost = True
            raise model.failures.pop()
        await asyncio.sleep(0)
        self.cached.extend(token_ids)
        self.traffic = replace(
            self.traffic,
            round_trips=self.traffic.round_trips + 2,
            sent_nbytes=self.traffic.sent_nbytes + 100 * len(token_ids),
            received_nbytes=self.traffic.received_nbytes + 10 * len(token_ids),
        )
        num_rows = {"none": 0, "last": 1, "all": len(token_ids)}[rows]
        logits = torch.zeros(num_rows, model.config.vocab_size)
        for row in range(num_rows):
            until = len(self.cached) - num_rows + row + 1
            logits[row, model.continuation(self.cached[:until])] = 20.0
        return logits

    async def forward_chunks(
        self, chunks: Seq[Seq[int]], position: int, *, all_rows: bool = False
    ) -> AsyncGenerator[torch.Tensor, None]:
        for index, chunk in enumerate(chunks):
            yield await self.forward(chunk, position, rows_of_chunk(index, len(chunks), all_rows))
            position += len(chunk)

    @property
    def is_open(self) -> bool:
        return not self.closed and not self.lost

    async def reopen(self) -> int:
        assert not self.closed
        if self._model.refusals:
            raise self._model.refusals.pop()
        self.lost = False
        del self.cached[self._model.num_kept :]
        return len(self.cached)

    async def aclose(self) -> None:
        self.closed = True


class FakeModel:
    """Opens ``FakeSequence``s that share their record of steps."""

    def __init__(
        self,
        continuation: Continuation = count_up,
        max_positions: int = 64,
        max_step_positions: int = 8,
    ) -> None:
        self.config: DecoderConfig = world().config
        self.max_positions = max_positions
        self.max_step_positions = max_step_positions
        self.continuation = continuation
        self.steps: list[tuple[list[int], int, Rows]] = []
        self.failures: list[Exception] = []
        """Raised by the next steps, the last one first."""
        self.refusals: list[PrivateLoRAError] = []
        """Raised instead of opening a sequence again, the last one first."""
        self.away: list[PrivateLoRAError] = []
        """Raised instead of opening one, the last one first."""
        self.num_kept = 0
        """Positions at most that are still there when one is opened again."""
        self.sequences: list[FakeSequence] = []
        self.max_sequences = 100
        """Open ones."""

    async def open_sequence(self, max_positions: int) -> FakeSequence:
        if max_positions > self.max_positions:
            raise RequestError("too long")
        if self.away:
            raise self.away.pop()
        if sum(not sequence.closed for sequence in self.sequences) >= self.max_sequences:
            raise CapacityError("the cloud is full")
        self.sequences.append(FakeSequence(self, max_positions))
        return self.sequences[-1]

    def taken_steps(self) -> list[tuple[list[int], int, Rows]]:
        """Steps since the last call."""
        taken, self.steps = self.steps, []
        return taken
