"""Exchange points with gradients: y of a span from z and M."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from privatelora.partition.plan import ExchangePoint, Plan, Target

Weights = Mapping[tuple[int, Target], torch.Tensor]
"""M by layer and target, float32 (rank_down, rank_up) each."""


def stack(plan: Plan, point: ExchangePoint, weights: Weights) -> torch.Tensor:
    """All M of a point: (layers * targets, rank_down, rank_up), layer-major."""
    return torch.stack([weights[layer, name] for layer in point.layers for name in plan.targets])


def reply(plan: Plan, z: torch.Tensor, stacked: torch.Tensor) -> torch.Tensor:
    """Y of every layer in a point's span: z (n, z_size) -> (n, S * y_size) float32.

    Differentiable in z and ``stacked``, which is all M of the point.
    """
    n, z = z.shape[0], z.float()
    if plan.num_blocks == 1:
        return F.linear(z, stacked.flatten(0, 1))
    blocks = z.view(n, plan.num_blocks, plan.rank_up).transpose(0, 1)
    repeats = stacked.shape[0] // plan.num_blocks
    y = torch.bmm(blocks.repeat(repeats, 1, 1), stacked.transpose(1, 2))
    return y.transpose(0, 1).reshape(n, -1)


def gradients(
    plan: Plan, z: torch.Tensor, stacked: torch.Tensor, of_y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to z (n, z_size) and ``stacked``, from that of y (n, S * y_size)."""
    with torch.enable_grad():
        leaves = z.detach().requires_grad_(), stacked.detach().requires_grad_()
        of_z, of_stacked = torch.autograd.grad(reply(plan, *leaves), leaves, of_y)
    return of_z, of_stacked
