"""Projecting a LoRA onto a basis: the M that come closest to it, and what they lose.

A LoRA adds ``D h_l`` to a projection of layer l, for its input ``h_l`` and a change D of the
weight. M can add ``scaling * B M A h_src``, where ``h_src`` is the input of the layer at which
the exchange point reads: layer l itself per layer, the first of the span grouped.

Without data, per layer, ``M = B^+ D A^+ / scaling`` is the least-squares solution for the
weights. With inputs, rows of H_src and H_l for the same tokens, M is the one for the outputs:
the smallest ``|scaling * U M^T B^T - H_l D^T|^2`` with ``U = H_src A^T``. B and U have a
pseudoinverse each, so that M is linear least squares in closed form. A small ridge keeps M near
the solution without data in directions that no token shows, and near zero where that solution
means nothing because the two inputs are those of different layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from privatelora.errors import PartitionError
from privatelora.partition.basis import lora_a_name, lora_b_name
from privatelora.partition.from_peft_file import PeftLora, Read
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import projection_weight
from privatelora.partition.plan import TARGETS, ExchangePoint, Plan, Target

RIDGE = 1e-4
"""Share of the mean energy of one column of U that is added to its square."""

Inputs = Mapping[int, Tensor]
"""Inputs (tokens, hidden_size) of the q, k and v projections by layer, float32."""


@dataclass(frozen=True)
class Lost:
    """What one projection loses, as shares of the LoRA's own energy (0: nothing).

    ``weights``: of the squared change of the weight; None where M reads another layer's input,
    so that weights cannot be compared. ``fitted``: of the squared change of the outputs on the
    inputs M was fitted to; ``held_out``: on others. None without such inputs. All of them can
    exceed 1: then M adds more error than leaving it out would.
    """

    layer: int
    target: Target
    weights: float | None
    fitted: float | None
    held_out: float | None


@dataclass(frozen=True)
class LeftOut:
    """A part of the LoRA that no M of the plan can carry, and its share of the LoRA's energy."""

    part: str
    num_parameters: int
    share: float


def changed_projections(
    lora: PeftLora, config: DecoderConfig
) -> tuple[tuple[int, ...], tuple[Target, ...]]:
    """Layers and targets in which a LoRA changes a q, k or v projection.

    Raises PartitionError if there are none.
    """
    found = [
        (layer, target)
        for layer in range(config.num_layers)
        for target in TARGETS
        if projection_weight(layer, target) in lora.changes
    ]
    if not found:
        raise PartitionError(
            "the LoRA changes no q, k or v projection, and only these can be adapted; train one "
            "with target_modules q_proj, k_proj, v_proj"
        )
    layers = tuple(sorted({layer for layer, _ in found}))
    return layers, tuple(target for target in TARGETS if any(t == target for _, t in found))


def project(
    lora: PeftLora,
    plan: Plan,
    basis: Mapping[str, Tensor],
    read: Read,
    inputs: Inputs | None,
    held_out: Inputs | None = None,
) -> tuple[dict[tuple[int, Target], Tensor], list[Lost]]:
    """Return M (rank_down, rank_up), float32, by layer and target, and what each loses.

    ``basis``: every A and B of the plan by name. ``inputs``: of all layers of the plan, from
    the frozen model; None: from the weights alone. M is zero where the LoRA changes nothing.
    Raises PartitionError if there is nothing to project, or a grouped plan has no inputs.
    """
    if inputs is None and plan.every > 1:
        raise PartitionError(
            "in a grouped plan a layer reads another layer's input, so weights alone do not tell "
            "what M has to be; let the model run on text"
        )
    if plan.scaling == 0:
        raise PartitionError("the plan's scaling is 0, so that no M changes anything; choose 1")
    weights: dict[tuple[int, Target], Tensor] = {}
    lost: list[Lost] = []
    for point in plan.points:
        blocks = torch.split(basis[lora_a_name(point)].double(), plan.rank_up)
        for layer in point.layers:
            for target in plan.targets:
                change = lora.changes.get(projection_weight(layer, target))
                if change is None:
                    weights[layer, target] = torch.zeros(plan.rank_down, plan.rank_up)
                    continue
                problem = _Problem(
                    delta=change.delta(read).double(),
                    lora_a=blocks[plan.block(target)],
                    lora_b=basis[lora_b_name(layer, target)].double() * plan.scaling,
                    same_input=layer == point.layer,
                )
                m = problem.solve(_rows(inputs, point, layer)).float()
                weights[layer, target] = m
                lost.append(
                    Lost(
                        layer,
                        target,
                        problem.lost_weights(m.double()),
                        problem.lost_outputs(m.double(), _rows(inputs, point, layer)),
                        problem.lost_outputs(m.double(), _rows(held_out, point, layer)),
                    )
                )
    if not lost:
        raise PartitionError(
            "the LoRA changes none of the projections that the plan adapts "
            f"({', '.join(plan.targets)} of {len(plan.layers)} layers); choose others"
        )
    return weights, lost


def left_out(lora: PeftLora, plan: Plan, read: Read) -> list[LeftOut]:
    """What of the LoRA has no place in the plan, the largest share first."""
    carried = {projection_weight(layer, target) for layer in plan.layers for target in plan.targets}
    total = 0.0
    energies: dict[str, list[float]] = {}
    for parameter, change in lora.changes.items():
        energy = change.energy(read)
        total += energy
        if parameter not in carried and energy > 0:
            energies.setdefault(_part(parameter), []).append(energy)
    parts = [LeftOut(part, len(found), sum(found) / total) for part, found in energies.items()]
    return sorted(parts, key=lambda part: -part.share)


def _part(parameter: str) -> str:
    """A parameter's name without its layer: ``self_attn.o_proj``, ``q_proj.bias``, ``lm_head``."""
    name = parameter.removesuffix(".weight").removeprefix("model.")
    if name.startswith("layers."):
        name = name.split(".", 2)[2]
    return name


_Rows = tuple[Tensor, Tensor]
"""Inputs of the layer that the exchange point reads at and of the layer itself, same tokens."""


def _rows(inputs: Inputs | None, point: ExchangePoint, layer: int) -> _Rows | None:
    return None if inputs is None else (inputs[point.layer].double(), inputs[layer].double())


@dataclass(frozen=True)
class _Problem:
    """One projection, in float64: delta (out, in), lora_a (rank_up, in), lora_b (out, rank_down).

    ``lora_b`` is scaled. ``same_input``: M reads this very layer's input.
    """

    delta: Tensor
    lora_a: Tensor
    lora_b: Tensor
    same_input: bool

    def solve(self, rows: _Rows | None) -> Tensor:
        """M (rank_down, rank_up), from the weights or from inputs."""
        down: Tensor = torch.linalg.pinv(self.lora_b)
        m = torch.zeros(self.lora_b.shape[1], self.lora_a.shape[0], dtype=torch.float64)
        if self.same_input:
            m = down @ self.delta @ torch.linalg.pinv(self.lora_a)
        if rows is None:
            return m
        source, own = rows
        u = source @ self.lora_a.T
        wanted = (own @ self.delta.T - u @ m.T @ self.lora_b.T) @ down.T
        gram = u.T @ u
        ridge = RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        gram.diagonal().add_(ridge)
        step: Tensor = torch.linalg.solve(gram, u.T @ wanted)
        return m + step.T

    def lost_weights(self, m: Tensor) -> float | None:
        """Share of the squared weights that M does not bring; None for another layer's input."""
        if not self.same_input:
            return None
        return _share(self.delta - self.lora_b @ m @ self.lora_a, self.delta)

    def lost_outputs(self, m: Tensor, rows: _Rows | None) -> float | None:
        """Share of the squared outputs that M does not bring on some inputs."""
        if rows is None:
            return None
        source, own = rows
        wanted = own @ self.delta.T
        return _share(wanted - source @ self.lora_a.T @ m.T @ self.lora_b.T, wanted)


def _share(error: Tensor, whole: Tensor) -> float:
    energy = float(whole.square().sum())
    return float(error.square().sum()) / energy if energy > 0 else 0.0
