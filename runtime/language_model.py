"""A decoder as generation sees it: token ids in, logits out, one sequence at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional as F

from privatelora.errors import RequestError
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import EMBED_TOKENS, FINAL_NORM, LM_HEAD
from privatelora.runtime.decoder import Tensors, linear
from privatelora.runtime.engine import Engine
from privatelora.runtime.exchange import PrivateMatrices, run_locally

Rows = Literal["none", "last", "all"]
"""Which positions of a step logits are wanted for."""


@dataclass
class Traffic:
    """What one sequence sent to the cloud and got from it.

    Bytes are those of the messages; a transport's own framing comes on top.
    """

    round_trips: int = 0
    sent_nbytes: int = 0
    received_nbytes: int = 0

    def plus(self, other: Traffic) -> Traffic:
        """Both together."""
        return Traffic(
            self.round_trips + other.round_trips,
            self.sent_nbytes + other.sent_nbytes,
            self.received_nbytes + other.received_nbytes,
        )

    def since(self, earlier: Traffic) -> Traffic:
        """What was added after ``earlier``."""
        return Traffic(
            self.round_trips - earlier.round_trips,
            self.sent_nbytes - earlier.sent_nbytes,
            self.received_nbytes - earlier.received_nbytes,
        )


class Sequence(Protocol):
    """One conversation's tokens and their KV cache, wherever it lies."""

    @property
    def traffic(self) -> Traffic:
        """Since the sequence was opened first; stays zero where nothing is sent."""

    async def forward(self, token_ids: Seq[int], position: int, rows: Rows) -> torch.Tensor:
        """Run ``token_ids`` at ``position`` on; logits (rows, vocab_size) float32.

        What the cache held from ``position`` on is forgotten first. Raises RequestError if
        they do not fit, TransportError or ProtocolError if the other side is lost.
        """

    def forward_chunks(
        self, chunks: Seq[Seq[int]], position: int, *, all_rows: bool = False
    ) -> AsyncGenerator[torch.Tensor, None]:
        """Run tokens from ``position`` on in steps, cut as ``chunks`` are; later ones may begin
        before earlier ones have ended.

        Yields each step's logits when it has ended: (1, vocab_size) for the last, none for the
        others; with ``all_rows`` those of all its positions, (len(chunk), vocab_size). Steps
        that were not yielded count as not run. Raises as ``forward``.
        """

    @property
    def is_open(self) -> bool:
        """Whether it can be run still: it was not closed, and the other side not lost."""

    async def reopen(self) -> int:
        """Open it again after it was lost, but not closed; positions that its cache still holds.

        Raises as ``LanguageModel.open_sequence``.
        """

    async def aclose(self) -> None:
        """Free the cache. May be repeated."""


class LanguageModel(Protocol):
    """Something that opens sequences."""

    config: DecoderConfig

    @property
    def max_positions(self) -> int:
        """Longest sequence it offers: prompt and answer together."""

    @property
    def max_step_positions(self) -> int:
        """Most positions it takes in one ``forward``."""

    async def open_sequence(self, max_positions: int) -> Sequence:
        """Reserve a cache; CapacityError when there is no room now."""


class Ends:
    """The two ends of a decoder stack that see tokens: embedding, and final norm with head."""

    def __init__(self, config: DecoderConfig, tensors: Tensors) -> None:
        """Take ``model.embed_tokens``, ``model.norm`` and, unless tied, ``lm_head``."""
        self._config = config
        self.embed_tokens = tensors[EMBED_TOKENS]
        self._norm = tensors[FINAL_NORM]
        tied = config.tie_word_embeddings
        self.lm_head = self.embed_tokens if tied else tensors[LM_HEAD]

    @torch.inference_mode()
    def embed(self, token_ids: Seq[int]) -> torch.Tensor:
        """Hidden states (n, hidden_size) of ``token_ids``; RequestError for an id out of range."""
        if not token_ids:
            raise RequestError("there are no tokens to run")
        if not 0 <= min(token_ids) <= max(token_ids) < self._config.vocab_size:
            raise RequestError(f"token ids must lie in 0 to {self._config.vocab_size - 1}")
        ids = torch.tensor(token_ids, device=self.embed_tokens.device)
        return F.embedding(ids, self.embed_tokens)

    @torch.inference_mode()
    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocab_size) float32 of final hidden states (n, hidden_size)."""
        normed = F.rms_norm(
            hidden_states.to(self._norm.dtype),
            self._norm.shape,
            self._norm,
            self._config.rms_norm_eps,
        )
        return linear(normed, self.lm_head).float()


class UnsplitModel:
    """The whole model and its adapter in one process: ground truth, baseline and tool."""

    max_step_positions = 512

    def __init__(
        self,
        ends: Ends,
        engine: Engine,
        matrices: PrivateMatrices | None,
        max_positions: int | None = None,
    ) -> None:
        self.config = engine.config
        self.max_positions = min(
            max_positions or self.config.max_positions, self.config.max_positions
        )
        self._ends = ends
        self._engine = engine
        self._matrices = matrices

    async def open_sequence(self, max_positions: int) -> UnsplitSequence:
        """Reserve a cache of ``max_positions``; RequestError beyond the context length."""
        if max_positions > self.max_positions:
            raise RequestError(
                f"a sequence of {max_positions} positions is longer than the context of "
                f"{self.max_positions}"
            )
        return UnsplitSequence(self._ends, self._engine, self._matrices, max_positions)


class UnsplitSequence:
    """A sequence of an ``UnsplitModel``."""

    def __init__(
        self, ends: Ends, engine: Engine, matrices: PrivateMatrices | None, max_positions: int
    ) -> None:
        self._ends = ends
        self._engine = engine
        self._matrices = matrices
        self._kv = engine.new_cache(max_positions)

    async def forward(self, token_ids: Seq[int], position: int, rows: Rows) -> torch.Tensor:
        """See ``Sequence.forward``."""
        step = self._engine.begin(self._ends.embed(token_ids), position, self._kv)
        run_locally(self._engine, step, self._matrices)
        return self._ends.logits(select_rows(step.hidden_states, rows))

    async def forward_chunks(
        self, chunks: Seq[Seq[int]], position: int, *, all_rows: bool = False
    ) -> AsyncGenerator[torch.Tensor, None]:
        """See ``Sequence.forward_chunks``; one after the other."""
        for index, chunk in enumerate(chunks):
            rows = rows_of_chunk(index, len(chunks), all_rows)
            yield await self.forward(chunk, position, rows)
            position += len(chunk)

    @property
    def traffic(self) -> Traffic:
        """See ``Sequence.traffic``."""
        return Traffic()

    @property
    def is_open(self) -> bool:
        """See ``Sequence.is_open``."""
        return True

    async def reopen(self) -> int:
        """See ``Sequence.reopen``; it is never lost, so nobody has a reason to."""
        return 0

    async def aclose(self) -> None:
        """See ``Sequence.aclose``; the memory goes with the object."""


def rows_of_chunk(index: int, num_chunks: int, all_rows: bool) -> Rows:
    """Which logits a chunk of ``Sequence.forward_chunks`` yields."""
    if all_rows:
        return "all"
    return "last" if index == num_chunks - 1 else "none"


def select_rows(hidden_states: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The rows of a step that logits are wanted for."""
    if rows == "all":
        return hidden_states
    return hidden_states[-1:] if rows == "last" else hidden_states[:0]
