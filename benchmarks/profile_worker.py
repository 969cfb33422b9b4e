"""An edge that notes when it does what, for ``privatelora-bench profile``.

    ... profile_worker EDGE.yaml PROMPT_TOKENS TOKENS
    <- {"event": "decoded", "spans": [["exchange", 12.31, 12.32], ...], "tokens": [12.30, ...]}

Spans: ``embed`` (from a token to its step being sent), ``exchange`` (from z to y being sent) and
``head``. All times are of this machine's monotonic clock, in seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from privatelora.cli._app import run as run_program
from privatelora.errors import ConfigError
from privatelora.partition.adapter import load_adapter
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.shard import open_shard
from privatelora.runtime.config import load_edge_config
from privatelora.runtime.device import compute_dtype
from privatelora.runtime.edge import link_settings
from privatelora.runtime.exchange import ExchangeAnswers, PrivateMatrices, StepExchanges
from privatelora.runtime.generation import Context, GenerationStats, generate_tokens
from privatelora.runtime.language_model import Ends
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.runtime.sent_log import SentLog
from privatelora.runtime.split_model import CloudAccess, EdgeParts, SplitModel
from privatelora.runtime.wire.messages import (
    ExchangeReply,
    Fingerprints,
    Message,
    StepBegin,
    TensorPayload,
)


class Notes:
    """Spans, in the order of their ends."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []
        self.since = 0.0
        """When what is being done now began."""

    def end(self, name: str) -> None:
        """It was that, and ends now."""
        self.spans.append((name, self.since, time.monotonic()))


class NotedEnds(Ends):
    """Notes the LM head, and when a token's embedding begins."""

    def __init__(self, config: DecoderConfig, tensors: dict[str, torch.Tensor], notes: Notes):
        super().__init__(config, tensors)
        self._notes = notes

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """See ``Ends.embed``."""
        self._notes.since = time.monotonic()
        return super().embed(token_ids)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See ``Ends.logits``."""
        self._notes.since = time.monotonic()
        try:
            return super().logits(hidden_states)
        finally:
            self._notes.end("head")


class NotedAnswers(ExchangeAnswers):
    """Notes when z of an exchange has come."""

    notes: Notes

    def __call__(
        self, index: int, asked: Sequence[tuple[StepExchanges, TensorPayload]]
    ) -> list[TensorPayload | ConfigError]:
        """See ``ExchangeAnswers``."""
        self.notes.since = time.monotonic()
        return super().__call__(index, asked)


class NotedSent(SentLog):
    """Notes when what was computed has been sent."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self._notes = notes

    def note(self, message: Message, nbytes: int) -> None:
        """See ``SentLog.note``."""
        if isinstance(message, StepBegin):
            self._notes.end("embed")
        elif isinstance(message, ExchangeReply):
            self._notes.end("exchange")


def main() -> None:
    """Decode once, and print what was noted."""
    from privatelora.runtime.loop import run

    file, prompt_tokens, num_tokens = sys.argv[1:]
    config = load_edge_config(Path(file))
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    shard = open_shard(config.shard, "edge")
    manifest = shard.manifest
    dtype, device = compute_dtype(config.dtype, manifest.dtype), torch.device("cpu")
    tensors = shard.load(device, dtype)
    notes = Notes()
    parts = EdgeParts(manifest.config, manifest.plan, tensors, device, dtype)
    parts.ends = NotedEnds(manifest.config, tensors, notes)
    parts.answers = NotedAnswers(manifest.plan, device)
    parts.answers.notes = notes
    prints = manifest.fingerprints
    [adapter_file] = config.adapter_files().values()
    adapter = load_adapter(adapter_file, manifest.plan, prints.basis, prints.model)
    access = CloudAccess(
        parts,
        Fingerprints(*prints),
        link_settings(config, config.payload),
        config.max_positions,
        config.prefill_chunk,
    )
    access.sent = NotedSent(notes)
    model = SplitModel(parts, access, PrivateMatrices(manifest.plan, adapter.weights))
    run(decode(model, access, notes, int(prompt_tokens), int(num_tokens)))


async def decode(
    model: SplitModel, access: CloudAccess, notes: Notes, prompt_tokens: int, num_tokens: int
) -> None:
    """One conversation, greedily."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    prompt = [100 + 7 * i % 1000 for i in range(prompt_tokens)]
    try:
        context = await Context.open(model, prompt_tokens + num_tokens)
        stream = generate_tokens(context, prompt, params, (), GenerationStats())
        tokens = [time.monotonic() async for _ in stream]
        await context.aclose()
    finally:
        await access.aclose()
    print(json.dumps({"event": "decoded", "spans": notes.spans, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    run_program(main)
