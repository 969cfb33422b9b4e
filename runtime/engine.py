"""Runs the decoder layers one side owns, a segment at a time.

A segment ends where an exchange point needs a reply that is not there yet. The engine does
not know who replies or how far away they are:

    step = engine.begin(hidden_states, position, kv)
    while (point := engine.advance(step)) is not None:
        # ship step.z, then use the wait:
        engine.precompute(step)
        step.supply(layers, y)
    hidden_states = step.hidden_states

Steps that stand at the same layer run together, whatever sequences they belong to:
``advance_batch``. Their rows go through the weights in one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from privatelora.errors import LocalProtocolError
from privatelora.partition.basis import lora_a_name
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.plan import ExchangePoint, Plan
from privatelora.runtime.decoder import (
    BatchContext,
    DecoderLayer,
    StepContext,
    Tensors,
    decoder_frequencies,
    linear,
    step_context,
)
from privatelora.runtime.kv_cache import KVCache, KVPool


class Step:
    """A run of consecutive positions of one sequence on its way through an engine."""

    __slots__ = ("context", "hidden_states", "layer_idx", "normed", "qkv", "y", "z")

    def __init__(self, hidden_states: torch.Tensor, context: StepContext, layer_idx: int) -> None:
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
        self.decoder = {i: DecoderLayer(config, plan, i, tensors) for i in layers}
        """The layers by their index."""
        self._adapted = frozenset(plan.layers) if plan is not None else frozenset[int]()
        self.points: dict[int, tuple[ExchangePoint, torch.Tensor]] = {}
        """The exchange points read here, by layer, with the A of each."""
        for point in plan.points if plan is not None else ():
            name = lora_a_name(point)
            if point.layer in layers and name in tensors:
                self.points[point.layer] = (point, tensors[name])
        self.frequencies = decoder_frequencies(config, device)

    def new_pool(self, max_positions: int) -> KVPool:
        """Room for the keys and values of ``max_positions``, of any number of sequences."""
        return KVPool(self.config, len(self.layers), max_positions, self.device, self.dtype)

    def new_cache(self, capacity: int) -> KVCache:
        """Keys and values for one sequence of up to ``capacity`` positions, with its own pool."""
        return self.new_pool(capacity).open(capacity)

    @torch.inference_mode()
    def begin(self, hidden_states: torch.Tensor, position: int, kv: KVCache) -> Step:
        """Start a step with rows (n, hidden_size) at ``position``.

        Reserves its positions in ``kv``: RequestError or CapacityError if that cannot be.
        """
        num_positions = hidden_states.shape[0]
        kv.reserve(position, num_positions)
        hidden_states = hidden_states.to(device=self.device, dtype=self.dtype)
        context = step_context(self.config, kv, position, num_positions, self.frequencies)
        return Step(hidden_states, context, self.layers.start)

    def advance(self, step: Step) -> ExchangePoint | None:
        """Run until an exchange is needed (its point is returned, ``step.z`` set) or the end."""
        return self.advance_batch((step,))

    @torch.inference_mode()
    def advance_batch(self, steps: Sequence[Step]) -> ExchangePoint | None:
        """Run steps together until they need an exchange or come to their end.

        Returns the point they have come to, with ``z`` of each set, or None at the end, with
        ``hidden_states`` of each final. All must stand at the same layer and have replies for
        the same layers, the one they wait at among them; steps of one sequence come in the order
        of their positions. LocalProtocolError otherwise, before anything has changed.
        """
        self._check_batch(steps)
        batch = BatchContext([step.context for step in steps])
        hidden_states = _join([step.hidden_states for step in steps])
        qkv = self._waiting_qkv(steps)
        for layer_idx in range(steps[0].layer_idx, self.layers.stop):
            layer = self.decoder[layer_idx]
            if qkv is None:
                normed = layer.norm_input(hidden_states)
                if layer_idx in self._adapted and layer_idx not in steps[0].y:
                    return self._wait(steps, layer_idx, hidden_states, normed)
                qkv = layer.project(normed)
            y = None
            if layer_idx in self._adapted:
                y = _join([step.y.pop(layer_idx) for step in steps])
            hidden_states = layer.finish(
                hidden_states, qkv, y, batch, layer_idx - self.layers.start
            )
            qkv = None
        for step, rows in zip(steps, _split(hidden_states, steps), strict=True):
            step.layer_idx = self.layers.stop
            step.hidden_states = rows
            step.z = step.normed = step.qkv = None
        return None

    def precompute(self, step: Step) -> None:
        """Compute the frozen q/k/v of the layer a step waits at, while the reply is on its way."""
        self.precompute_batch((step,))

    @torch.inference_mode()
    def precompute_batch(self, steps: Sequence[Step]) -> None:
        """As ``precompute``, for steps that wait at the same layer, in one product."""
        waiting = [step for step in steps if step.qkv is None and step.normed is not None]
        if waiting:
            qkv = self.decoder[waiting[0].layer_idx].project(_join_normed(waiting))
            for step, rows in zip(waiting, _split(qkv, waiting), strict=True):
                step.qkv = rows

    def _waiting_qkv(self, steps: Sequence[Step]) -> torch.Tensor | None:
        """Frozen q/k/v of the layer that steps have waited at; None if some are only beginning."""
        if any(step.normed is None for step in steps):
            return None
        if all(step.qkv is None for step in steps):
            return self.decoder[steps[0].layer_idx].project(_join_normed(steps))
        self.precompute_batch(steps)
        return _join([step.qkv for step in steps if step.qkv is not None])

    def _check_batch(self, steps: Sequence[Step]) -> None:
        if not steps:
            raise LocalProtocolError("a batch needs at least one step")
        first = steps[0]
        ends: dict[int, int] = {}
        for step in steps:
            context = step.context
            if step.layer_idx != first.layer_idx:
                raise LocalProtocolError(
                    f"steps at layers {first.layer_idx} and {step.layer_idx} cannot run together"
                )
            if step.y.keys() != first.y.keys():
                raise LocalProtocolError("steps with replies for other layers cannot run together")
            if step.z is not None and step.layer_idx not in step.y:
                raise LocalProtocolError(f"a step has no reply yet for layer {step.layer_idx}")
            if ends.get(id(context.kv), context.position) != context.position:
                raise LocalProtocolError("steps of one sequence must run in order, without gaps")
            ends[id(context.kv)] = context.position + context.num_positions

    def _wait(
        self,
        steps: Sequence[Step],
        layer_idx: int,
        hidden_states: torch.Tensor,
        normed: torch.Tensor,
    ) -> ExchangePoint:
        """Leave steps at an exchange point, each with its own rows of what it needs there."""
        point, lora_a = self.points[layer_idx]
        parts = (_split(rows, steps) for rows in (hidden_states, normed, linear(normed, lora_a)))
        for step, step_hidden, step_normed, step_z in zip(steps, *parts, strict=True):
            step.layer_idx = layer_idx
            step.hidden_states, step.normed, step.z = step_hidden, step_normed, step_z
            step.qkv = None
        return point


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of several steps, one below the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _join_normed(steps: Sequence[Step]) -> torch.Tensor:
    return _join([step.normed for step in steps if step.normed is not None])


def _split(rows: torch.Tensor, steps: Sequence[Step]) -> Sequence[torch.Tensor]:
    """Each step's own rows, as views."""
    if len(steps) == 1:
        return (rows,)
    return rows.split_with_sizes([step.context.num_positions for step in steps])
