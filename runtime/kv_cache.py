"""Keys and values of one sequence, for the layers that one side owns."""

from __future__ import annotations

import torch

from privatelora.errors import RequestError
from privatelora.partition.models.config import DecoderConfig


def attention_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Precision of q, k, v, their additions through B, and attention.

    On a CPU float32 whatever the compute dtype: attention in half precision is many times
    slower there (9 heads over 512 positions: 26 us in float32, 376 us in float16).
    """
    return torch.float32 if device.type == "cpu" else dtype


class KVCache:
    """Preallocated keys and values, written at explicit positions.

    Truncation is free: a step that starts at position ``p`` overwrites what was there, and
    attention reads only up to its own last position, so nothing behind it is ever seen.

    Memory on a CPU is reserved but not touched until it is used.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_layers: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Reserve room for ``capacity`` positions of ``num_layers`` layers."""
        self.capacity = capacity
        self.dtype = attention_dtype(device, dtype)
        shape = (num_layers, 2, config.num_kv_heads, capacity, config.head_dim)
        self._data = torch.empty(shape, device=device, dtype=self.dtype)
        # Views made once: slicing a tensor in the hot path costs more than the copy it precedes.
        self._layers = [(layer[0], layer[1]) for layer in self._data.unbind(0)]

    def check_room(self, position: int, num_positions: int) -> None:
        """Raise RequestError if positions up to ``position + num_positions`` do not fit."""
        if position + num_positions > self.capacity:
            raise RequestError(
                f"positions {position} to {position + num_positions - 1} do not fit a sequence "
                f"of {self.capacity}; ask for a longer sequence or send a shorter prompt"
            )

    def store(
        self, index: int, position: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (num_kv_heads, n, head_dim) at ``position``; return all up to their end.

        ``index`` counts the layers of this cache from 0. Returns views of shape
        (num_kv_heads, position + n, head_dim).
        """
        cached_keys, cached_values = self._layers[index]
        end = position + keys.shape[1]
        cached_keys[:, position:end] = keys
        cached_values[:, position:end] = values
        return cached_keys[:, :end], cached_values[:, :end]
