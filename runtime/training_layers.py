"""Decoder layers that gradients go back through: the same frozen weights as ``decoder.py`` runs.

Rows of a batch are those of whole sequences, one after the other. Weights take no gradient;
hidden states and y do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from privatelora.partition.models.config import DecoderConfig
from privatelora.runtime.decoder import DecoderLayer, linear
from privatelora.runtime.kv_cache import attention_dtype
from privatelora.runtime.rotary import rotary


class _FrozenLinear(torch.autograd.Function):
    """``decoder.linear``, which autograd does not know, and the same product on the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradients[0], weight.t()), None, None


def frozen_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x W^T + b``, differentiable in x (n, in_features) alone."""
    out: torch.Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _Bucket:
    """Sequences of about one length, padded behind their ends to run through attention together."""

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        self.num_sequences, self.longest = len(lengths), max(lengths)
        slots = [torch.arange(length) + i * self.longest for i, length in enumerate(lengths)]
        rows = [torch.arange(length) + start for start, length in zip(starts, lengths, strict=True)]
        self.slots = torch.cat(slots).to(device)
        """Where each of its rows is, (num_sequences * longest) being all there are."""
        self.rows = torch.cat(rows).to(device)
        """Which of the batch's they are."""
        self.is_full = len(self.slots) == self.num_sequences * self.longest


class PackedBatch:
    """Sequences that lie one after the other in the rows of a batch, each from position 0 on."""

    def __init__(
        self,
        config: DecoderConfig,
        lengths: Sequence[int],
        frequencies: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """``dtype``: of the engine that runs it."""
        device = frequencies.device
        self.num_rows = sum(lengths)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        longest = max(lengths)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        precision = attention_dtype(device, dtype)
        of_positions = rotary(frequencies, 0, longest, precision)
        self.cos, self.signed_sin = of_positions.index_select(1, positions).unbind(0)
        # Within a factor of two in length, so padding at most doubles the rows.
        of_length: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            of_length.setdefault(length.bit_length(), []).append(index)
        self.buckets = [
            _Bucket([starts[i] for i in members], [lengths[i] for i in members], device)
            for members in of_length.values()
        ]
        self.sliding_masks: dict[int, torch.Tensor] = {}
        """By length: what a row sees where the model has a sliding window that is shorter."""
        if config.sliding_layers and config.sliding_window is not None:
            for bucket in self.buckets:
                if bucket.longest > config.sliding_window:
                    ones = torch.ones(
                        bucket.longest, bucket.longest, dtype=torch.bool, device=device
                    )
                    self.sliding_masks[bucket.longest] = ones.tril().triu(1 - config.sliding_window)


def run_layer(
    layer: DecoderLayer, hidden_states: torch.Tensor, y: torch.Tensor | None, batch: PackedBatch
) -> torch.Tensor:
    """The output (n, hidden_size) of one layer; ``y`` (n, y_size) as ``DecoderLayer.finish``."""
    qkv = frozen_linear(layer.norm_input(hidden_states), layer.qkv_weight, layer.qkv_bias)
    if y is not None:
        qkv = qkv + _added(layer, y)
    attended = _attend(layer, qkv.to(batch.cos.dtype), batch).to(hidden_states.dtype)
    hidden_states = hidden_states + frozen_linear(attended, layer.output_weight, layer.output_bias)
    normed = F.rms_norm(
        hidden_states, layer.post_norm.shape, layer.post_norm, layer.config.rms_norm_eps
    )
    gate_up = frozen_linear(normed, layer.gate_up_weight, layer.gate_up_bias)
    gate, up = gate_up.chunk(2, dim=-1)
    return hidden_states + frozen_linear(F.silu(gate) * up, layer.down_weight, layer.down_bias)


def _added(layer: DecoderLayer, y: torch.Tensor) -> torch.Tensor:
    """What y adds to q, k and v, through B."""
    parts, end = [], 0
    for rows, columns, lora_b in layer.lora_B:
        if rows.start > end:
            parts.append(y.new_zeros(y.shape[0], rows.start - end))
        parts.append(frozen_linear(y[:, columns], lora_b))
        end = rows.stop
    if end < layer.qkv_weight.shape[0]:
        parts.append(y.new_zeros(y.shape[0], layer.qkv_weight.shape[0] - end))
    return torch.cat(parts, dim=1)


def _attend(layer: DecoderLayer, qkv: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Attention of every sequence to itself: (n, num_heads * head_dim)."""
    config = layer.config
    num_q, num_kv = config.num_heads, config.num_kv_heads
    heads = qkv.view(-1, num_q + 2 * num_kv, config.head_dim)
    queries, keys, values = heads.split_with_sizes([num_q, num_kv, num_kv], dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        shape, eps = layer.q_norm.shape, config.rms_norm_eps
        queries = F.rms_norm(queries, shape, layer.q_norm, eps)
        keys = F.rms_norm(keys, shape, layer.k_norm, eps)
    queries, keys = _rotated(queries, batch), _rotated(keys, batch)
    parts = [
        _attend_bucket(layer, queries, keys, values, bucket, batch) for bucket in batch.buckets
    ]
    if len(parts) == 1:  # of which the rows are in their order
        return parts[0]
    order = torch.cat([bucket.rows for bucket in batch.buckets])
    joined = torch.cat(parts)
    return torch.zeros_like(joined).index_copy(0, order, joined)


def _rotated(heads: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    half = heads.shape[-1] // 2
    return heads * batch.cos + heads.roll(half, -1) * batch.signed_sin


def _attend_bucket(
    layer: DecoderLayer,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bucket: _Bucket,
    batch: PackedBatch,
) -> torch.Tensor:
    """Attention of a bucket's sequences. Padding comes last, where no row sees it."""
    config = layer.config
    n, longest, group = (
        bucket.num_sequences,
        bucket.longest,
        config.num_heads // config.num_kv_heads,
    )

    def padded(heads: torch.Tensor) -> torch.Tensor:
        """(n * num_kv, 1 or group, longest, head_dim)."""
        if len(batch.buckets) > 1:
            heads = heads.index_select(0, bucket.rows)
        if not bucket.is_full:
            empty = heads.new_zeros(n * longest, *heads.shape[1:])
            heads = empty.index_copy(0, bucket.slots, heads)
        shape = (n, longest, config.num_kv_heads, -1, config.head_dim)
        return heads.reshape(shape).permute(0, 2, 3, 1, 4).flatten(0, 1)

    mask = batch.sliding_masks.get(longest) if layer.sliding else None
    attended = F.scaled_dot_product_attention(
        padded(queries),
        padded(keys).expand(-1, group, -1, -1),
        padded(values).expand(-1, group, -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
    )
    of_positions = attended.view(n, config.num_kv_heads, group, longest, config.head_dim)
    rows = of_positions.permute(0, 3, 1, 2, 4).reshape(n * longest, -1)
    return rows if bucket.is_full else rows.index_select(0, bucket.slots)
