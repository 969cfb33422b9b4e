"""Forward and backward through the layers one side owns, a slice of a layer at a time.

The weights are those that ``Engine`` holds. Of a step that is to go back only the input of every
layer and y are kept, and a layer is computed again on the way back: memory for rows * hidden_size
numbers a layer, and a third more time.

Both passes are generators, so that whoever drives them has a turn after every slice, and decides
where the answers of exchange points come from:

    forward = step.forward()
    turn = next(forward)              # None: nothing to do but to go on
    turn = forward.send(y)            # after an Exchange, whose tensor is z
    ... until StopIteration, whose value is the final hidden states
    backward = step.backward(gradient)   # the same: of an Exchange the tensor is y's gradient,
                                         # and its answer z's
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from privatelora.partition.plan import ExchangePoint, Plan
from privatelora.runtime.decoder import linear
from privatelora.runtime.engine import Engine
from privatelora.runtime.training_layers import PackedBatch, frozen_linear, run_layer


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a pass needs an answer to: z on the way forward, the gradient of y on the way back."""

    point: ExchangePoint
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a backward pass comes to, for whoever ran the layers in front.

    ``opening``: with respect to y of ``Plan.opening_layers`` (n, their number * y_size), None if
    there are none. ``hidden_states``: with respect to the first layer's input, None if nobody
    needs it.
    """

    opening: torch.Tensor | None
    hidden_states: torch.Tensor | None


Pass = Generator[Exchange | None, torch.Tensor | None, torch.Tensor]
BackwardPass = Generator[Exchange | None, torch.Tensor | None, Gradients]


class TrainingEngine:
    """Runs training steps through the layers of an engine."""

    def __init__(self, engine: Engine, plan: Plan, max_slice_rows: int) -> None:
        """``max_slice_rows``: computed at once, of whole sequences; a longer one is a slice."""
        self.engine = engine
        self.plan = plan
        self._max_slice_rows = max_slice_rows
        self.needs_input_gradient = plan.layers[0] < plan.cloud_layers.start
        """Whether a layer in front of the cloud's is adapted."""

    def begin(
        self,
        hidden_states: torch.Tensor,
        lengths: Sequence[int],
        opening: torch.Tensor | None,
        *,
        keep: bool,
    ) -> TrainingStep:
        """A step of sequences of ``lengths``, whose rows (n, hidden_size) lie one after the other.

        ``opening``: y of ``Plan.opening_layers`` side by side. ``keep``: for a backward pass.
        """
        slices, start, members = [], 0, list[int]()
        for length in lengths:
            if members and sum(members) + length > self._max_slice_rows:
                slices.append(self._slice(start, members))
                start, members = start + sum(members), []
            members.append(length)
        slices.append(self._slice(start, members))
        return TrainingStep(self, hidden_states, slices, opening, keep=keep)

    def _slice(self, start: int, lengths: Sequence[int]) -> Slice:
        engine = self.engine
        batch = PackedBatch(engine.config, lengths, engine.frequencies, engine.dtype)
        return Slice(slice(start, start + batch.num_rows), batch)


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a step that are computed together: those of whole sequences."""

    rows: slice
    batch: PackedBatch


class TrainingStep:
    """A batch on its way through the layers of an engine, and back. Made by ``begin``."""

    def __init__(
        self,
        owner: TrainingEngine,
        hidden_states: torch.Tensor,
        slices: Sequence[Slice],
        opening: torch.Tensor | None,
        *,
        keep: bool,
    ) -> None:
        self.num_rows = hidden_states.shape[0]
        self._engine, self._plan = owner.engine, owner.plan
        self._needs_input_gradient = owner.needs_input_gradient
        self._hidden_states = hidden_states
        self._slices = slices
        self._keep = keep
        self._inputs: dict[int, torch.Tensor] = {}
        """Of every layer that the backward pass comes to."""
        self._y: dict[int, torch.Tensor] = {}
        if opening is not None:
            self._supply(self._plan.opening_layers, opening)

    @property
    def _lowest(self) -> int:
        """The layer where the backward pass ends: below it nothing is adapted."""
        if self._needs_input_gradient:
            return self._engine.layers.start
        adapted = self._plan.layers
        return next((i for i in self._engine.layers if i in adapted), self._engine.layers.stop)

    def forward(self) -> Pass:
        """Run the layers; the final hidden states (n, hidden_size) at the end."""
        hidden_states = self._hidden_states
        del self._hidden_states
        for index in self._engine.layers:
            if self._keep and index >= self._lowest:
                self._inputs[index] = hidden_states
            if index in self._engine.points:
                point, _ = self._engine.points[index]
                y = yield Exchange(point, self._z(index, hidden_states))
                if y is None:
                    raise RuntimeError("a forward pass was sent no y")
                self._supply(self._plan.span_in(point, self._engine.layers), y)
            parts = []
            for piece in self._slices:
                parts.append(self._forward_slice(index, hidden_states, piece))
                yield None
            hidden_states = _join(parts)
            if not self._keep:
                self._y.pop(index, None)
        return hidden_states

    def backward(self, gradient: torch.Tensor) -> BackwardPass:
        """Go back from the gradient of the final hidden states (n, hidden_size)."""
        engine, plan = self._engine, self._plan
        of_y: dict[int, torch.Tensor] = {}
        for index in reversed(range(self._lowest, engine.layers.stop)):
            hidden_states, y = self._inputs.pop(index), self._y.pop(index, None)
            goes_on = index > self._lowest or self._needs_input_gradient
            parts, y_parts = [], []
            for piece in self._slices:
                part, y_part = self._backward_slice(
                    index, hidden_states, y, gradient, piece, goes_on=goes_on
                )
                parts.append(part)
                y_parts.append(y_part)
                yield None
            if goes_on:
                gradient = _join([part for part in parts if part is not None])
            if y is not None:
                of_y[index] = _join([part for part in y_parts if part is not None])
            if index in engine.points:
                point, _ = engine.points[index]
                span = plan.span_in(point, engine.layers)
                of_z = yield Exchange(point, torch.cat([of_y.pop(i) for i in span], dim=1))
                if of_z is None:
                    raise RuntimeError("a backward pass was sent no gradient of z")
                if goes_on:
                    gradient = gradient + self._through_z(index, hidden_states, of_z)
        opening = None
        if plan.opening_layers:
            opening = torch.cat([of_y.pop(i) for i in plan.opening_layers], dim=1)
        return Gradients(opening, gradient if self._needs_input_gradient else None)

    def _supply(self, layers: Sequence[int], y: torch.Tensor) -> None:
        self._y.update(zip(layers, y.chunk(len(layers), dim=1), strict=True))

    @torch.no_grad()
    def _z(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        _, lora_a = self._engine.points[index]
        return linear(self._engine.decoder[index].norm_input(hidden_states), lora_a)

    @torch.enable_grad()
    def _through_z(
        self, index: int, hidden_states: torch.Tensor, of_z: torch.Tensor
    ) -> torch.Tensor:
        """What the gradient of z is for the hidden states it was read from."""
        _, lora_a = self._engine.points[index]
        leaf = hidden_states.detach().requires_grad_()
        z = frozen_linear(self._engine.decoder[index].norm_input(leaf), lora_a)
        return torch.autograd.grad(z, leaf, of_z)[0]

    @torch.no_grad()
    def _forward_slice(self, index: int, hidden_states: torch.Tensor, piece: Slice) -> torch.Tensor:
        y = self._y.get(index)
        layer = self._engine.decoder[index]
        of_piece = None if y is None else y[piece.rows]
        return run_layer(layer, hidden_states[piece.rows], of_piece, piece.batch)

    @torch.enable_grad()
    def _backward_slice(
        self,
        index: int,
        hidden_states: torch.Tensor,
        y: torch.Tensor | None,
        gradient: torch.Tensor,
        piece: Slice,
        *,
        goes_on: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of a layer's input, None unless the pass ``goes_on``, and of its y, if any."""
        layer = self._engine.decoder[index]
        leaf = hidden_states[piece.rows].detach().requires_grad_(goes_on)
        of_piece = None if y is None else y[piece.rows].detach().requires_grad_()
        out = run_layer(layer, leaf, of_piece, piece.batch)
        leaves = [tensor for tensor in (leaf, of_piece) if tensor is not None]
        wanted = [tensor for tensor in leaves if tensor.requires_grad]
        gradients = list(torch.autograd.grad(out, wanted, gradient[piece.rows]))
        of_input = gradients.pop(0) if goes_on else None
        return of_input, gradients.pop(0) if gradients else None


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
