"""The private half of an exchange: ``y = z M^T`` for every layer and target of a span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from privatelora.errors import ConfigError, RemoteProtocolError
from privatelora.partition.plan import ExchangePoint, Plan, Target
from privatelora.runtime.engine import Engine, Step
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.wire.messages import TensorPayload


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


def reply_with(
    plan: Plan, matrices: PrivateMatrices | None, point: ExchangePoint, z: torch.Tensor
) -> torch.Tensor:
    """Y of every layer in the point's span, (n, S * y_size) float32; zero without an adapter."""
    if matrices is None:
        return torch.zeros(z.shape[0], len(point.layers) * plan.y_size, device=z.device)
    return matrices.reply(point, z)


def run_locally(engine: Engine, step: Step, matrices: PrivateMatrices | None) -> None:
    """Run a step to its end with M at hand; no M counts as zero.

    What a span holds for layers of another engine stays in ``step.y``.
    """
    while (point := engine.advance(step)) is not None:
        z = step.z
        if z is None or engine.plan is None:
            raise RuntimeError("an engine asked for an exchange without a plan")
        y = reply_with(engine.plan, matrices, point, z)
        step.supply(point.layers, y.to(engine.dtype))


@dataclass
class StepExchanges:
    """What the exchanges of a step in flight need to know of it, and what they leave."""

    matrices: PrivateMatrices | None
    """The adapter it runs with; without one y is zero."""
    num_rows: int
    codec: str
    """What y is packed with."""
    late_y: dict[int, torch.Tensor] = field(default_factory=dict)
    """Y (num_rows, y_size) for layers the edge runs after the cloud's."""


class ExchangeAnswers:
    """Answers exchange requests, those of one point and one adapter with one product."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan = plan
        self._device = device
        self._num_cloud_layers = {
            point.index: len(plan.span_in(point, plan.cloud_layers)) for point in plan.wire_points
        }
        """How many of a span's layers the cloud has, by the index of each point it may ask for."""

    def __call__(
        self, index: int, asked: Sequence[tuple[StepExchanges, TensorPayload]]
    ) -> list[TensorPayload | ConfigError]:
        """Y for the cloud's layers, from z of point ``index`` of different steps, at least one.

        What the edge's own layers need is left in ``late_y``. A ConfigError stands where a
        codec cannot carry a value. Raises RemoteProtocolError for a z that cannot be.
        """
        plan = self._plan
        num_cloud = self._num_cloud_layers.get(index)
        if num_cloud is None:
            raise RemoteProtocolError(f"the cloud asked for point {index}, which is not its own")
        point = plan.points[index]
        all_z = [self._read(step, z) for step, z in asked]
        all_y = self._multiply(point, [step for step, _ in asked], all_z)
        if late_layers := point.layers[num_cloud:]:
            num_late = len(late_layers) * plan.y_size
            for i, (step, _) in enumerate(asked):
                late_y = all_y[i][:, -num_late:].chunk(len(late_layers), dim=1)
                step.late_y.update(zip(late_layers, late_y, strict=True))
                all_y[i] = all_y[i][:, :-num_late]
        return [_pack_or_refuse(y, step.codec) for y, (step, _) in zip(all_y, asked, strict=True)]

    def _multiply(
        self, point: ExchangePoint, steps: Sequence[StepExchanges], all_z: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        if len(steps) == 1:
            return [reply_with(self._plan, steps[0].matrices, point, all_z[0])]
        all_y = list(all_z)
        of_adapter: dict[PrivateMatrices | None, list[int]] = {}
        for i, step in enumerate(steps):
            of_adapter.setdefault(step.matrices, []).append(i)
        for matrices, members in of_adapter.items():
            z = torch.cat([all_z[i] for i in members])
            together = reply_with(self._plan, matrices, point, z)
            parts = together.split_with_sizes([steps[i].num_rows for i in members])
            for i, y in zip(members, parts, strict=True):
                all_y[i] = y
        return all_y

    def _read(self, step: StepExchanges, z: TensorPayload) -> torch.Tensor:
        if z.shape != (step.num_rows, self._plan.z_size):
            raise RemoteProtocolError(
                f"z of {z.shape[0]} x {z.shape[1]} came where {step.num_rows} x "
                f"{self._plan.z_size} was due"
            )
        return unpack(z, self._device, torch.float32)


def _pack_or_refuse(y: torch.Tensor, codec: str) -> TensorPayload | ConfigError:
    try:
        return pack(y, codec)
    except ConfigError as error:
        return error
