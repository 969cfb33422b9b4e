"""Runs the decoder layers one side owns, a segment at a time.

A segment ends where an exchange point needs a reply that is not there yet. The engine does
not know who replies or how far away they are:

    step = engine.begin(hidden_states, position, kv)
    while (point := engine.advance(step)) is not None:
        # ship step.z, then use the wait:
        engine.precompute(step)
        step.supply(layers, y)
    hidden_states = step.hidden_states
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from privatelora.partition.basis import lora_a_name
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.plan import ExchangePoint, Plan
from privatelora.runtime.decoder import (
    AttentionContext,
    DecoderLayer,
    Tensors,
    attention_context,
    decoder_frequencies,
    linear,
)
from privatelora.runtime.kv_cache import KVCache


class Step:
    """A run of consecutive positions of one sequence on its way through an engine."""

    __slots__ = ("context", "hidden_states", "layer_idx", "normed", "qkv", "y", "z")

    def __init__(
        self, hidden_states: torch.Tensor, context: AttentionContext, layer_idx: int
    ) -> None:
        self.hidden_states = hidden_states
        self.context = context
        self.layer_idx = layer_idx
        """Next layer to run."""
        self.z: torch.Tensor | None = None
        """What to ship to the exchange point the step waits at: (n, z_size)."""
        self.y: dict[int, torch.Tensor] = {}
        """Replies by layer that are still to be used: (n, y_size) each."""
        self.normed: torch.Tensor | None = None
        self.qkv: torch.Tensor | None = None

    def supply(self, layers: Sequence[int], y: torch.Tensor) -> None:
        """Give y (n, len(layers) * y_size) of ``layers``, at least one, in their order."""
        self.y.update(zip(layers, y.chunk(len(layers), dim=1), strict=True))


class Engine:
    """Frozen layers ``layers`` of a decoder, with the public matrices A and B they need."""

    def __init__(
        self,
        config: DecoderConfig,
        plan: Plan | None,
        layers: range,
        tensors: Tensors,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Build from Hugging Face named ``tensors`` on ``device``; no plan: the plain model.

        Weights that are fused are taken out of ``tensors``.
        """
        self.config = config
        self.plan = plan
        self.layers = layers
        self.device = device
        self.dtype = dtype
        self._decoder = {i: DecoderLayer(config, plan, i, tensors) for i in layers}
        self._adapted = frozenset(plan.layers) if plan is not None else frozenset[int]()
        self._points: dict[int, tuple[ExchangePoint, torch.Tensor]] = {}
        for point in plan.points if plan is not None else ():
            name = lora_a_name(point)
            if point.layer in layers and name in tensors:
                self._points[point.layer] = (point, tensors[name])
        self._frequencies = decoder_frequencies(config, device)

    def new_cache(self, capacity: int) -> KVCache:
        """Keys and values for one sequence of up to ``capacity`` positions."""
        return KVCache(self.config, len(self.layers), capacity, self.device, self.dtype)

    @torch.inference_mode()
    def begin(self, hidden_states: torch.Tensor, position: int, kv: KVCache) -> Step:
        """Start a step with rows (n, hidden_size) at ``position``; RequestError if too long."""
        num_positions = hidden_states.shape[0]
        kv.check_room(position, num_positions)
        hidden_states = hidden_states.to(device=self.device, dtype=self.dtype)
        context = attention_context(self.config, kv, position, num_positions, self._frequencies)
        return Step(hidden_states, context, self.layers.start)

    @torch.inference_mode()
    def advance(self, step: Step) -> ExchangePoint | None:
        """Run until an exchange is needed (its point is returned, ``step.z`` set) or the end."""
        for layer_idx in range(step.layer_idx, self.layers.stop):
            layer = self._decoder[layer_idx]
            if step.normed is None:
                step.normed = layer.norm_input(step.hidden_states)
            if layer_idx in self._adapted and layer_idx not in step.y:
                point, lora_a = self._points[layer_idx]
                step.layer_idx = layer_idx
                step.z = linear(step.normed, lora_a)
                return point
            qkv = step.qkv if step.qkv is not None else layer.project(step.normed)
            step.hidden_states = layer.finish(
                step.hidden_states,
                qkv,
                step.y.pop(layer_idx, None),
                step.context,
                layer_idx - self.layers.start,
            )
            step.normed = step.qkv = None
        step.layer_idx = self.layers.stop
        step.z = None
        return None

    @torch.inference_mode()
    def precompute(self, step: Step) -> None:
        """Compute the frozen q/k/v of the layer a step waits at, while the reply is on its way."""
        if step.qkv is None and step.normed is not None:
            step.qkv = self._decoder[step.layer_idx].project(step.normed)
