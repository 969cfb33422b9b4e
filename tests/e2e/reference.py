"""What the ground truth, a transformers model, answers."""

from __future__ import annotations

from typing import Any

import torch


@torch.inference_mode()
def greedy_with_logits(
    model: Any, prompt_ids: list[int], num_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits (prompt + num_tokens - 1, vocab) along the way, cached."""
    out = model(torch.tensor([prompt_ids]), use_cache=True)
    logits, tokens = [out.logits[0]], [int(out.logits[0, -1].argmax())]
    while len(tokens) < num_tokens:
        out = model(
            torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True
        )
        logits.append(out.logits[0])
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens, torch.cat(logits)
