"""Which layers exchange, through what ranks and basis, and which side owns which layer.

A plan has two halves. The *arrangement* (adapted layers, targets, ranks, ``every``,
``scaling``) decides what the numbers in M mean: an adapter fits one arrangement. The
*placement* (``edge_first``, ``edge_last``) decides only who computes what, so one adapter
serves under every placement.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from privatelora.errors import PartitionError
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import MAX_LAYERS

Target = Literal["q", "k", "v"]
TARGETS: tuple[Target, ...] = ("q", "k", "v")


def fingerprint(value: object) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ExchangePoint:
    """Where ``z = h A^T`` is read, and the adapted layers that its reply serves.

    ``layer``: the hidden states read are the output of this layer's input norm.
    ``layers``: adapted layers of the span, ascending; the first is ``layer``.
    """

    index: int
    layers: tuple[int, ...]

    @property
    def layer(self) -> int:
        """Layer whose normed input is projected through A."""
        return self.layers[0]


class Plan(BaseModel):
    """A complete description of one split; equal plans give interchangeable shards.

    Shapes that follow, per exchange point with ``S`` layers in its span and ``T`` targets:
    A ``(num_blocks * rank_up, hidden_size)``, z ``(n, num_blocks * rank_up)``,
    M per layer and target ``(rank_down, rank_up)``, y ``(n, S * T * rank_down)`` ordered
    layer-major then by target, B per layer and target ``(out_features, rank_down)``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    num_layers: int = Field(gt=0, le=MAX_LAYERS)
    layers: tuple[int, ...]
    targets: tuple[Target, ...] = TARGETS
    rank_up: int = Field(default=128, gt=0)
    rank_down: int = Field(default=128, gt=0)
    every: int = Field(default=1, gt=0)
    """Adapted layers per exchange point. 1: each target has an A of its own (per layer).
    More: all layers and targets of a span share one A (grouped)."""
    scaling: float = Field(default=1.0, allow_inf_nan=False)
    edge_first: int = Field(default=0, ge=0)
    edge_last: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if len(set(self.layers)) != len(self.layers) or list(self.layers) != sorted(self.layers):
            raise ValueError("layers must be ascending, without repeats")
        for layer in self.layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"layer {layer} does not exist: the model has layers 0 to {self.num_layers - 1}"
                )
        if not self.layers:
            raise ValueError("layers is empty: name at least one layer to adapt")
        if not self.targets or list(self.targets) != [t for t in TARGETS if t in self.targets]:
            raise ValueError("targets must be one or more of q, k, v, in that order")
        if self.edge_first + self.edge_last >= self.num_layers:
            raise ValueError(
                f"edge_first {self.edge_first} + edge_last {self.edge_last} leave the cloud no "
                f"layer: the model has {self.num_layers}"
            )
        return self

    @property
    def num_blocks(self) -> int:
        """Blocks of ``rank_up`` numbers in one z: one a target per layer, one shared grouped."""
        return len(self.targets) if self.every == 1 else 1

    def block(self, target: Target) -> int:
        """Index of the z block that ``target`` reads."""
        return self.targets.index(target) if self.every == 1 else 0

    @property
    def z_size(self) -> int:
        """Numbers per token that one exchange point ships."""
        return self.num_blocks * self.rank_up

    @property
    def y_size(self) -> int:
        """Numbers per token that come back for one adapted layer."""
        return len(self.targets) * self.rank_down

    @property
    def num_parameters(self) -> int:
        """Numbers in all M together: what training may change."""
        return len(self.layers) * len(self.targets) * self.rank_up * self.rank_down

    @cached_property
    def points(self) -> tuple[ExchangePoint, ...]:
        """All exchange points, ascending."""
        spans = [
            self.layers[start : start + self.every]
            for start in range(0, len(self.layers), self.every)
        ]
        return tuple(ExchangePoint(index, span) for index, span in enumerate(spans))

    @cached_property
    def point_at(self) -> dict[int, ExchangePoint]:
        """Exchange point by the layer it reads at."""
        return {point.layer: point for point in self.points}

    @cached_property
    def cloud_layers(self) -> range:
        """Layers the cloud owns."""
        return range(self.edge_first, self.num_layers - self.edge_last)

    @cached_property
    def edge_first_layers(self) -> range:
        """Layers the edge runs before the cloud."""
        return range(self.edge_first)

    @cached_property
    def edge_last_layers(self) -> range:
        """Layers the edge runs after the cloud."""
        return range(self.num_layers - self.edge_last, self.num_layers)

    @cached_property
    def folded_point(self) -> ExchangePoint | None:
        """The point at the first cloud layer, whose z the edge computes itself, if there is one."""
        return self.point_at.get(self.edge_first)

    @cached_property
    def wire_points(self) -> tuple[ExchangePoint, ...]:
        """Points that cost a round trip: read inside the cloud, past its first layer."""
        return tuple(p for p in self.points if p.layer in self.cloud_layers[1:])

    def span_in(self, point: ExchangePoint, layers: range) -> tuple[int, ...]:
        """Layers of the point's span that lie in ``layers``."""
        return tuple(layer for layer in point.layers if layer in layers)

    @cached_property
    def opening_layers(self) -> tuple[int, ...]:
        """Cloud layers whose y travels with the hidden states at the start of a step."""
        return tuple(
            layer
            for point in self.points
            if point.layer <= self.edge_first
            for layer in self.span_in(point, self.cloud_layers)
        )

    def arrangement(self) -> dict[str, object]:
        """What M depends on: everything but the placement."""
        return self.model_dump(mode="json", exclude={"edge_first", "edge_last"})

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the whole plan; cloud and edge must agree on it."""
        return fingerprint(self.model_dump(mode="json"))

    def check_model(self, config: DecoderConfig) -> None:
        """Raise PartitionError when the plan asks for more than the model has."""
        if self.num_layers != config.num_layers:
            raise PartitionError(
                f"the plan is for {self.num_layers} layers, the model has {config.num_layers}"
            )
        if self.rank_up > config.hidden_size:
            raise PartitionError(
                f"rank_up {self.rank_up} is larger than the hidden size; choose at most "
                f"{config.hidden_size}"
            )
        for target in self.targets:
            size = config.projection_size(target)
            if self.rank_down > size:
                raise PartitionError(
                    f"rank_down {self.rank_down} is larger than the output of the {target} "
                    f"projection ({size}); choose at most {size}, or leave {target} out of targets"
                )
