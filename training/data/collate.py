"""Examples of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from privatelora.training.data.examples import Encoded

IGNORED = -100
"""The label of a position that no loss is taken on."""


def collate(
    batch: Sequence[Encoded], *, pad_token_id: int, loss_on: Literal["answer", "all"] = "answer"
) -> dict[str, Any]:
    """Return a batch padded on the left, so that the answers end together.

    ``input_ids`` and ``attention_mask``: (B, T) int64. ``logits_to_keep``: K, the longest answer
    and one more (with ``loss_on`` all: T): logits of the last K positions suffice. ``labels``:
    (B, K) int64, for each of these the token that follows it, -100 where no loss is taken, so
    always at the last. ``reference``: (B,) int64.
    """
    length = max(len(example.input_ids) for example in batch)
    input_ids = torch.full((len(batch), length), pad_token_id)
    attention_mask = torch.zeros(len(batch), length, dtype=torch.int64)
    labels = torch.full((len(batch), length), IGNORED)
    counts = [
        len(example.input_ids) - 1 if loss_on == "all" else example.num_answer for example in batch
    ]
    for row, (example, count) in enumerate(zip(batch, counts, strict=True)):
        ids = torch.tensor(example.input_ids)
        input_ids[row, length - len(ids) :] = ids
        attention_mask[row, length - len(ids) :] = 1
        if count:
            labels[row, -1 - count : -1] = ids[-count:]
    keep = max(counts) + 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels[:, -keep:],
        "logits_to_keep": keep,
        "reference": torch.tensor([example.reference for example in batch]),
    }
