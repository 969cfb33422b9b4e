"""What the ground truth, a transformers model, answers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import LlamaForCausalLM

CACHE = next(
    name
    for name in ("cache", "past_key_values")  # as it was called before transformers 5.24
    if name in inspect.signature(LlamaForCausalLM.forward).parameters
)


@torch.inference_mode()
def greedy_with_logits(
    model: Any, prompt_ids: list[int], num_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits (prompt + num_tokens - 1, vocab) along the way, cached."""
    out = model(torch.tensor([prompt_ids]), use_cache=True)
    logits, tokens = [out.logits[0]], [int(out.logits[0, -1].argmax())]
    while len(tokens) < num_tokens:
        cache = {CACHE: getattr(out, CACHE)}
        out = model(torch.tensor([tokens[-1:]]), use_cache=True, **cache)
        logits.append(out.logits[0])
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens, torch.cat(logits)
