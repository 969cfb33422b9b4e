"""What one decoded token puts on the wire, computed from shapes."""

from __future__ import annotations

from dataclasses import dataclass

from privatelora.partition.plan import Plan
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.payload.codec import plain_nbytes
from privatelora.runtime.wire.tensor_frames import (
    ONE_TENSOR_HEADER_NBYTES,
    TWO_TENSORS_HEADER_NBYTES,
)


@dataclass(frozen=True)
class TokenCost:
    """Bytes of one decoded token: numbers alone, and with the messages' headers."""

    payload_up: int
    payload_down: int
    headers: int
    round_trips: int

    @property
    def payload(self) -> int:
        """Both directions, without headers."""
        return self.payload_up + self.payload_down

    @property
    def total(self) -> int:
        """Both directions, with headers; a transport's own framing comes on top."""
        return self.payload + self.headers


def token_cost(plan: Plan, hidden_size: int, codecs: Codecs) -> TokenCost:
    """Cost of decoding one token (EXCHANGE, "Cost per decoded token"), before compression."""
    up = plain_nbytes(codecs.hidden_states_up, (1, hidden_size))
    if plan.opening_layers:
        up += plain_nbytes(codecs.exchange_up, (1, len(plan.opening_layers) * plan.y_size))
    down = plain_nbytes(codecs.hidden_states_down, (1, hidden_size))
    for point in plan.wire_points:
        num_layers = len(plan.span_in(point, plan.cloud_layers))
        up += plain_nbytes(codecs.exchange_up, (1, num_layers * plan.y_size))
        down += plain_nbytes(codecs.exchange_down, (1, plan.z_size))
    num_exchanges = len(plan.wire_points)
    headers = TWO_TENSORS_HEADER_NBYTES + (1 + 2 * num_exchanges) * ONE_TENSOR_HEADER_NBYTES
    return TokenCost(up, down, headers, 1 + num_exchanges)


def full_hidden_states_nbytes(num_layers: int, hidden_size: int) -> int:
    """Bytes of a token if fp16 hidden states went to the edge and q, k, v updates came back.

    At every layer, without the low rank: for 32 layers of 4096, 1.05 MB.
    """
    return num_layers * (1 + 3) * hidden_size * 2
