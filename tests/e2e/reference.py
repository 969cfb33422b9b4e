"""The ground truth: a transformers model that adds the adapter in its own forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from privatelora.partition.adapter import Adapter
from privatelora.partition.basis import lora_a_name, lora_b_name
from privatelora.partition.plan import Plan


def attach_adapter(
    model: Any, plan: Plan, basis: Mapping[str, torch.Tensor], adapter: Adapter
) -> Any:
    """Hook ``out += scaling * ((h_src A^T) M^T) B^T`` into the projections; return ``model``.

    Written after the formula alone: nothing of the runtime is used.
    """
    sources: dict[int, torch.Tensor] = {}
    for point in plan.points:
        lora_a = basis[lora_a_name(point)].split(plan.rank_up)

        def remember(_m: Any, _args: Any, out: torch.Tensor, index: int = point.index) -> None:
            sources[index] = out

        model.model.layers[point.layer].input_layernorm.register_forward_hook(remember)
        for layer in point.layers:
            for number, target in enumerate(plan.targets):
                a = lora_a[number] if plan.every == 1 else lora_a[0]
                m = adapter.weights[layer, target]
                b = basis[lora_b_name(layer, target)]

                def add(
                    _m: Any,
                    _args: Any,
                    out: torch.Tensor,
                    index: int = point.index,
                    factors: tuple[torch.Tensor, ...] = (a, m, b),
                ) -> torch.Tensor:
                    delta = sources[index]
                    for factor in factors:
                        delta = delta @ factor.to(delta.dtype).T
                    return out + plan.scaling * delta

                projection = getattr(model.model.layers[layer].self_attn, f"{target}_proj")
                projection.register_forward_hook(add)
    return model


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
