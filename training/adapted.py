"""M inside a transformers model, differentiable, for any arrangement of exchange points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from privatelora.partition.basis import lora_a_name, lora_b_name
from privatelora.partition.plan import ExchangePoint, Plan, Target


class AdaptedProjections(nn.Module):
    """The private matrices M of one plan, with the public A and B around them.

    ``attach`` hooks it onto a decoder: each adapted projection then gives
    ``W h + scaling * ((h_src A^T) M^T) B^T``. M is float32 and starts at zero, so that nothing
    changes before the first step of training; z, y and the sum are in the decoder's dtype, as
    they are when cloud and edge serve.
    """

    def __init__(
        self,
        plan: Plan,
        basis: Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype,
        train_basis: bool = False,
    ) -> None:
        """Take every A and B of ``plan`` by name, float32.

        ``train_basis``: they are parameters too, kept in float32, instead of frozen in ``dtype``.
        """
        super().__init__()
        self.plan = plan
        self.lora_M = nn.ParameterDict(
            {
                _key(layer, target): nn.Parameter(torch.zeros(plan.rank_down, plan.rank_up))
                for layer in plan.layers
                for target in plan.targets
            }
        )
        self._names = tuple(basis)
        for name, tensor in basis.items():
            if train_basis:
                self.register_parameter(_attribute(name), nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(_attribute(name), tensor.to(dtype), persistent=False)
        self._z: dict[int, tuple[torch.Tensor, ...]] = {}
        """What each exchange point has read in the present pass: one block per target, or one."""

    def attach(self, decoder: Any) -> None:
        """Hook onto the layers of a transformers decoder (its ``.layers``)."""
        for point in self.plan.points:
            decoder.layers[point.layer].input_layernorm.register_forward_hook(self._reader(point))
            for layer in point.layers:
                for target in self.plan.targets:
                    projection = getattr(decoder.layers[layer].self_attn, f"{target}_proj")
                    projection.register_forward_hook(self._adder(point, layer, target))

    def weights(
        self, state: Mapping[str, torch.Tensor] | None = None
    ) -> dict[tuple[int, Target], torch.Tensor]:
        """M by layer and target: float32 (rank_down, rank_up), on the CPU, a copy.

        ``state``: this module's own state dict, where its parameters are held elsewhere.
        """
        state = self.state_dict() if state is None else state
        return {
            (layer, target): state[f"lora_M.{_key(layer, target)}"].detach().to("cpu", copy=True)
            for layer in self.plan.layers
            for target in self.plan.targets
        }

    def load_weights(self, weights: Mapping[tuple[int, Target], torch.Tensor]) -> None:
        """Take what ``weights`` gave."""
        with torch.no_grad():
            for key, weight in weights.items():
                self.lora_M[_key(*key)].copy_(weight)

    def basis(self, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """A and B where they train, by name, as ``weights`` gives M."""
        state = self.state_dict() if state is None else state
        return {name: state[_attribute(name)].detach().to("cpu", copy=True) for name in self._names}

    def load_basis(self, basis: Mapping[str, torch.Tensor]) -> None:
        """Take what ``basis`` gave."""
        with torch.no_grad():
            for name, tensor in basis.items():
                self._basis(name).copy_(tensor)

    def _basis(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = getattr(self, _attribute(name))
        return tensor

    def _reader(self, point: ExchangePoint) -> Any:
        name = lora_a_name(point)

        def read(_module: nn.Module, _args: object, normed: torch.Tensor) -> None:
            z = F.linear(normed, self._basis(name).to(normed.dtype))
            self._z[point.index] = z.chunk(self.plan.num_blocks, dim=-1)

        return read

    def _adder(self, point: ExchangePoint, layer: int, target: Target) -> Any:
        name, key = lora_b_name(layer, target), _key(layer, target)
        block = self.plan.block(target)

        def add(_module: nn.Module, _args: object, out: torch.Tensor) -> torch.Tensor:
            z = self._z[point.index][block]
            y = F.linear(z.float(), self.lora_M[key]).to(out.dtype)
            return out + F.linear(y, self._basis(name).to(out.dtype) * self.plan.scaling)

        return add


def _key(layer: int, target: Target) -> str:
    return f"{layer}_{target}"


def _attribute(name: str) -> str:
    """A module's attributes have no dots in their names."""
    return name.replace(".", "_")
