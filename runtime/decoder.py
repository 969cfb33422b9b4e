"""One decoder layer: attention and feed-forward on the rows of one step.

A layer is cut at its q/k/v projection, because that is where an exchange may have to be
waited for: ``norm_input`` and ``project`` need nothing from the edge, ``finish`` does.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from privatelora.partition.basis import lora_b_name
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import layer_prefix
from privatelora.partition.plan import Plan
from privatelora.runtime.kv_cache import KVCache, attention_dtype
from privatelora.runtime.rotary import Rotary, apply_rotary, inverse_frequencies, rotary

Tensors = MutableMapping[str, torch.Tensor]

# From this many rows on, float16 products on a CPU are computed in float32: processors without
# float16 arithmetic convert one number at a time in a matrix-matrix product, but not in a
# matrix-vector one (3072 x 576: 5.1 ms against 1.6 ms for 64 rows).
UPCAST_ROWS = 8


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b`` for x (n, in_features), weight (out_features, in_features)."""
    if x.dtype is torch.float16 and x.shape[0] >= UPCAST_ROWS and not x.is_cuda:
        wide_bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide_bias).to(torch.float16)
    return F.linear(x, weight, bias)


@dataclass
class AttentionContext:
    """What the layers of one step share: where it is, its rotary embedding and its masks."""

    kv: KVCache
    position: int
    num_positions: int
    rotary: Rotary
    full_mask: torch.Tensor | None
    sliding_mask: torch.Tensor | None


def attention_context(
    config: DecoderConfig,
    kv: KVCache,
    position: int,
    num_positions: int,
    frequencies: torch.Tensor,
) -> AttentionContext:
    """Prepare a step of ``num_positions`` rows that starts at ``position``."""
    end = position + num_positions
    device = frequencies.device
    full_mask = sliding_mask = None
    window = config.sliding_window if config.sliding_layers else None
    if num_positions > 1 or (window is not None and end > window):
        rows = torch.arange(position, end, device=device).unsqueeze(1)
        columns = torch.arange(end, device=device).unsqueeze(0)
        visible = columns <= rows
        if num_positions > 1:
            full_mask = visible
        if window is not None:
            sliding_mask = visible & (columns > rows - window)
    return AttentionContext(
        kv=kv,
        position=position,
        num_positions=num_positions,
        rotary=rotary(frequencies, position, num_positions, kv.dtype),
        full_mask=full_mask,
        sliding_mask=sliding_mask,
    )


class DecoderLayer:
    """The frozen weights of one layer, fused where one product can serve several."""

    def __init__(
        self, config: DecoderConfig, plan: Plan | None, layer_idx: int, tensors: Tensors
    ) -> None:
        """Take layer ``layer_idx`` from Hugging Face named ``tensors``.

        Weights that are fused are taken out of ``tensors``, so that a model is never held twice.
        With a ``plan`` that adapts this layer, ``tensors`` also hold its ``lora_B``.
        """
        prefix = layer_prefix(layer_idx)
        attention, mlp = f"{prefix}self_attn", f"{prefix}mlp"
        self.config = config
        self.layer_idx = layer_idx
        self.input_norm = tensors[f"{prefix}input_layernorm.weight"]
        self.post_norm = tensors[f"{prefix}post_attention_layernorm.weight"]
        self.q_norm, self.k_norm = (
            None if norm is None else norm.to(attention_dtype(norm.device, norm.dtype))
            for norm in (tensors.get(f"{attention}.{name}_norm.weight") for name in "qk")
        )

        def fused(*names: str, suffix: str) -> torch.Tensor | None:
            parts = [tensors[f"{name}.{suffix}"] for name in names if f"{name}.{suffix}" in tensors]
            return torch.cat(parts) if parts else None

        def required(*names: str) -> torch.Tensor:
            return torch.cat([tensors.pop(f"{name}.weight") for name in names])

        qkv = [f"{attention}.{name}_proj" for name in "qkv"]
        self.qkv_weight = required(*qkv)
        self.qkv_bias = fused(*qkv, suffix="bias")
        self.output_weight = tensors[f"{attention}.o_proj.weight"]
        self.output_bias = tensors.get(f"{attention}.o_proj.bias")
        gate_up = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        self.gate_up_weight = required(*gate_up)
        self.gate_up_bias = fused(*gate_up, suffix="bias")
        self.down_weight = tensors[f"{mlp}.down_proj.weight"]
        self.down_bias = tensors.get(f"{mlp}.down_proj.bias")
        self.sliding = layer_idx in config.sliding_layers

        self.lora_B: list[tuple[slice, slice, torch.Tensor]] = []
        """Per target: rows of q/k/v it adds to, columns of y it reads, B scaled."""
        if plan is not None and layer_idx in plan.layers:
            starts = {"q": 0, "k": config.projection_size("q")}
            starts["v"] = starts["k"] + config.projection_size("k")
            for index, target in enumerate(plan.targets):
                rows = slice(starts[target], starts[target] + config.projection_size(target))
                columns = slice(index * plan.rank_down, (index + 1) * plan.rank_down)
                lora_b = tensors[lora_b_name(layer_idx, target)] * plan.scaling
                self.lora_B.append((rows, columns, lora_b))

    def norm_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Input norm of (n, hidden_size): what q, k, v and an exchange point read."""
        return F.rms_norm(
            hidden_states, self.input_norm.shape, self.input_norm, self.config.rms_norm_eps
        )

    def project(self, normed: torch.Tensor) -> torch.Tensor:
        """Frozen q, k and v projections in one product: (n, q + k + v features)."""
        return linear(normed, self.qkv_weight, self.qkv_bias)

    def finish(
        self,
        hidden_states: torch.Tensor,
        qkv: torch.Tensor,
        y: torch.Tensor | None,
        context: AttentionContext,
        kv_index: int,
    ) -> torch.Tensor:
        """The rest of the layer, from q/k/v (changed in place) to its output (n, hidden_size).

        ``y``: (n, num_targets * rank_down), added through B; None for an unadapted layer.
        """
        if y is not None:
            for rows, columns, lora_b in self.lora_B:
                if y.shape[0] == 1:
                    qkv[0, rows].addmv_(lora_b, y[0, columns])
                else:
                    qkv[:, rows] += linear(y[:, columns], lora_b)
        attended = self._attend(qkv.to(context.kv.dtype), context, kv_index).to(hidden_states.dtype)
        hidden_states = hidden_states + linear(attended, self.output_weight, self.output_bias)
        normed = F.rms_norm(
            hidden_states, self.post_norm.shape, self.post_norm, self.config.rms_norm_eps
        )
        gate, up = linear(normed, self.gate_up_weight, self.gate_up_bias).chunk(2, dim=-1)
        return hidden_states + linear(F.silu(gate) * up, self.down_weight, self.down_bias)

    def _attend(self, qkv: torch.Tensor, context: AttentionContext, kv_index: int) -> torch.Tensor:
        config, n = self.config, context.num_positions
        num_q, num_kv = config.num_heads, config.num_kv_heads
        heads = qkv.view(n, num_q + 2 * num_kv, config.head_dim)
        queries_keys = heads[:, : num_q + num_kv]
        if self.q_norm is not None and self.k_norm is not None:
            shape, eps = self.q_norm.shape, config.rms_norm_eps
            queries = F.rms_norm(heads[:, :num_q], shape, self.q_norm, eps)
            keys = F.rms_norm(heads[:, num_q : num_q + num_kv], shape, self.k_norm, eps)
            queries_keys = torch.cat((queries, keys), dim=1)
        rotated = apply_rotary(queries_keys, context.rotary).transpose(0, 1)
        keys, values = context.kv.store(
            kv_index, context.position, rotated[num_q:], heads[:, num_q + num_kv :].transpose(0, 1)
        )
        attended = F.scaled_dot_product_attention(
            rotated[:num_q].unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=context.sliding_mask if self.sliding else context.full_mask,
            enable_gqa=num_q != num_kv,
        )
        return attended[0].transpose(0, 1).reshape(n, num_q * config.head_dim)


def decoder_frequencies(config: DecoderConfig, device: torch.device) -> torch.Tensor:
    """Rotary frequencies of a decoder on ``device``."""
    return inverse_frequencies(config.rope, config.head_dim).to(device)
