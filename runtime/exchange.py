"""The private half of an exchange: ``y = z M^T`` for every layer and target of a span."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from privatelora.partition.plan import ExchangePoint, Plan, Target
from privatelora.runtime.engine import Engine, Step


class PrivateMatrices:
    """All M of one adapter, stacked so that one product answers one exchange point."""

    def __init__(self, plan: Plan, weights: Mapping[tuple[int, Target], torch.Tensor]) -> None:
        """Take M by (layer, target), each (rank_down, rank_up), as float32."""
        self._plan = plan
        self._stacked = [
            torch.stack(
                [
                    weights[layer, target].float()
                    for layer in point.layers
                    for target in plan.targets
                ]
            )
            for point in plan.points
        ]
        # (num_matrices, rank_up, rank_down) per layer: one block of z for each matrix.
        # (1, rank_up, num_matrices * rank_down) grouped: one block of z for all of them.
        self._factors = [
            m.transpose(1, 2).contiguous()
            if plan.every == 1
            else m.flatten(0, 1).t().contiguous().unsqueeze(0)
            for m in self._stacked
        ]

    @property
    def num_parameters(self) -> int:
        """How many numbers M has in all."""
        return sum(m.numel() for m in self._stacked)

    @torch.inference_mode()
    def reply(self, point: ExchangePoint, z: torch.Tensor) -> torch.Tensor:
        """Y of every layer in the point's span: z (n, z_size) -> (n, S * y_size) float32."""
        n = z.shape[0]
        blocks = z.float().view(n, self._plan.num_blocks, self._plan.rank_up).transpose(0, 1)
        return torch.bmm(blocks, self._factors[point.index]).transpose(0, 1).reshape(n, -1)


def run_locally(engine: Engine, step: Step, matrices: PrivateMatrices | None) -> None:
    """Run a step to its end with M at hand; no M counts as zero.

    What a span holds for layers of another engine stays in ``step.y``.
    """
    while (point := engine.advance(step)) is not None:
        z = step.z
        if z is None or engine.plan is None:
            raise RuntimeError("an engine asked for an exchange without a plan")
        if matrices is not None:
            y = matrices.reply(point, z)
        else:
            y = z.new_zeros(z.shape[0], len(point.layers) * engine.plan.y_size)
        step.supply(point.layers, y.to(engine.dtype))
