"""The private half of an exchange: ``y = z M^T`` for every layer and target of a span."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from privatelora.partition.plan import ExchangePoint, Plan, Target
from privatelora.runtime.engine import Engine, Step


class PrivateMatrices:
    """All M of one adapter, stacked so that one product answers one exchange point."""

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[tuple[int, Target], torch.Tensor],
        device: torch.device | None = None,
    ) -> None:
        """Take M by (layer, target), each (rank_down, rank_up), for use on ``device`` (CPU)."""
        self._plan = plan
        self._factors = []
        for point in plan.points:
            matrices = [weights[layer, name] for layer in point.layers for name in plan.targets]
            stacked = torch.stack(matrices).to(device, torch.float32)
            if plan.every == 1:  # (T, rank_up, rank_down): a block of z for each matrix
                factor = stacked.transpose(1, 2)
            else:  # (1, rank_up, S * T * rank_down): one block of z for all of them
                factor = stacked.flatten(0, 1).t().unsqueeze(0)
            self._factors.append(factor.contiguous())

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
