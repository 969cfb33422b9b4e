"""The adapter inside a transformers model: ground truth of tests, baseline of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from privatelora.partition.basis import lora_a_name, lora_b_name
from privatelora.partition.plan import Plan, Target


def attach_adapter(
    model: Any,
    plan: Plan,
    basis: Mapping[str, torch.Tensor],
    weights: Mapping[tuple[int, Target], torch.Tensor],
) -> Any:
    """Add ``scaling * ((h_src A^T) M^T) B^T`` to the projections by hooks; return ``model``.

    Written after EXCHANGE's formula alone, with nothing of the runtime. ``basis``: A and B by
    their names; ``weights``: M by layer and target. All come into the model's dtype
    and onto its device.
    """
    sources: dict[int, torch.Tensor] = {}
    for point in plan.points:
        lora_a = basis[lora_a_name(point)].to(model.device, model.dtype)

        def remember(_m: Any, _args: Any, out: torch.Tensor, index: int = point.index) -> None:
            sources[index] = out

        model.model.layers[point.layer].input_layernorm.register_forward_hook(remember)
        for layer in point.layers:
            for target in plan.targets:
                start = plan.block(target) * plan.rank_up
                factors = (
                    lora_a[start : start + plan.rank_up],
                    weights[layer, target].to(model.device, model.dtype),
                    basis[lora_b_name(layer, target)].to(model.device, model.dtype) * plan.scaling,
                )

                def add(
                    _m: Any,
                    _args: Any,
                    out: torch.Tensor,
                    index: int = point.index,
                    factors: tuple[torch.Tensor, ...] = factors,
                ) -> torch.Tensor:
                    delta = sources[index]
                    for factor in factors:
                        delta = torch.nn.functional.linear(delta, factor)
                    return out + delta

                projection = getattr(model.model.layers[layer].self_attn, f"{target}_proj")
                projection.register_forward_hook(add)
    return model
