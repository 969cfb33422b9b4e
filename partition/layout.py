"""Which tensor lives on which side.

The cloud holds its decoder layers, the A of every point that costs a round trip, and the B of
its adapted layers. The edge holds embedding, final norm and LM head, its own layers with their
B, the A of every point it reads itself, and for a folded point a copy of the input norm of the
cloud's first layer, through which it computes that point's z.
"""

from __future__ import annotations

from typing import Literal

from privatelora.partition.basis import basis_shapes, lora_a_name, lora_b_name
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import Shape, layer_prefix, layer_tensors, tensor_names
from privatelora.partition.plan import Plan

ShardRole = Literal["cloud", "edge"]
ROLES: tuple[ShardRole, ...] = ("cloud", "edge")


def folded_norm_name(plan: Plan) -> str | None:
    """Name of the cloud layer's input norm that the edge holds too, if a point is folded."""
    if plan.folded_point is None:
        return None
    return f"{layer_prefix(plan.folded_point.layer)}input_layernorm.weight"


def shard_shapes(config: DecoderConfig, plan: Plan, role: ShardRole) -> dict[str, Shape]:
    """Names and shapes of all tensors, frozen and basis, that one side holds."""
    frozen, basis = tensor_names(config), basis_shapes(plan, config)
    cloud: set[str] = {lora_a_name(point) for point in plan.wire_points}
    for layer in plan.cloud_layers:
        cloud.update(layer_tensors(config, layer))
        if layer in plan.layers:
            cloud.update(lora_b_name(layer, target) for target in plan.targets)
    both = {folded_norm_name(plan)}
    return {
        name: shape
        for name, shape in (frozen | basis).items()
        if (name in cloud) == (role == "cloud") or name in both
    }
