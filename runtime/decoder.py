"""One decoder layer: attention and feed-forward on the rows of a batch of steps.

A layer is cut at its q/k/v projection, because that is where an exchange may have to be
waited for: ``norm_input`` and ``project`` need nothing from the edge, ``finish`` does.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from privatelora.partition.basis import lora_b_name
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import layer_prefix
from privatelora.partition.plan import Plan
from privatelora.runtime.kv_cache import KVCache, attention_dtype
from privatelora.runtime.rotary import apply_rotary_, inverse_frequencies, rotary

Tensors = MutableMapping[str, torch.Tensor]

# From this many rows on, float16 products on a CPU are computed in float32: processors without
# float16 arithmetic take the rows one by one (0.3 ms a row for a layer of SmolLM2-135M), while
# converting the weights takes 0.4 ms once.
UPCAST_ROWS = 4

# oneDNN's own product, which torch.compile also calls. F.linear takes it for bfloat16 but not for
# float32, where MKL takes up to twice as long on processors not made by Intel (16 rows of a layer
# of SmolLM2-135M: 1.9 ms against 1.2 ms; one row: 0.83 ms against 0.55 ms).
_ONEDNN_LINEAR = (
    torch.ops.mkldnn._linear_pointwise
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    else None
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b`` for x (n, in_features), weight (out_features, in_features)."""
    num_rows = x.shape[0]
    if not x.is_cpu or num_rows == 0:
        return F.linear(x, weight, bias)
    if x.dtype is torch.float16:
        if num_rows < UPCAST_ROWS:
            return F.linear(x, weight, bias)
        wide_bias = None if bias is None else bias.float()
        return linear(x.float(), weight.float(), wide_bias).to(torch.float16)
    if num_rows > 8:  # oneDNN compiles a kernel for every shape: about 1 ms and 0.6 MB each
        step = 1 << ((num_rows - 1).bit_length() - 3)  # four row counts per octave
        x = F.pad(x, (0, 0, 0, -num_rows % step))
    if x.dtype is torch.float32 and _ONEDNN_LINEAR is not None:
        out: torch.Tensor = _ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    else:
        out = F.linear(x, weight, bias)
    return out[:num_rows] if num_rows > 8 else out


@dataclass(slots=True)
class Visible:
    """The positions that the rows of a step may see in a layer: ``start`` to the step's end."""

    start: int
    mask: torch.Tensor | None
    """0 or -inf to add to attention scores, (num_positions, end - start); None: all are seen."""


@dataclass(slots=True)
class StepContext:
    """What the layers of one step share: where it is, its rotary embedding, what it may see."""

    kv: KVCache
    position: int
    num_positions: int
    rotary: torch.Tensor
    """(2, num_positions, 1, head_dim)."""
    full: Visible
    sliding: Visible


def step_context(
    config: DecoderConfig,
    kv: KVCache,
    position: int,
    num_positions: int,
    frequencies: torch.Tensor,
) -> StepContext:
    """Prepare a step of ``num_positions`` rows that starts at ``position``."""
    dtype = kv.pool.dtype
    full = sliding = _visible(position, num_positions, None, frequencies.device, dtype)
    if config.sliding_layers:
        sliding = _visible(
            position, num_positions, config.sliding_window, frequencies.device, dtype
        )
    return StepContext(
        kv=kv,
        position=position,
        num_positions=num_positions,
        rotary=rotary(frequencies, position, num_positions, dtype),
        full=full,
        sliding=sliding,
    )


def _visible(
    position: int,
    num_positions: int,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Visible:
    """What rows from ``position`` on see: themselves, and the ``window`` - 1 positions before."""
    start = 0 if window is None else max(0, position - window + 1)
    if num_positions == 1:
        return Visible(start, None)
    end = position + num_positions
    rows = torch.arange(position, end, device=device).unsqueeze(1)
    columns = torch.arange(start, end, device=device).unsqueeze(0)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    mask = torch.zeros(hidden.shape, device=device, dtype=dtype)
    return Visible(start, mask.masked_fill_(hidden, float("-inf")))


class BatchContext:
    """Steps whose rows, joined in this order, go through a layer together."""

    def __init__(self, steps: Sequence[StepContext]) -> None:
        """Of at least one step."""
        self.steps = steps
        self.num_rows = [step.num_positions for step in steps]
        """Rows of each step."""
        self.rotary = (
            steps[0].rotary
            if len(steps) == 1
            else torch.cat([step.rotary for step in steps], dim=1)
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
        batch: BatchContext,
        kv_index: int,
    ) -> torch.Tensor:
        """The rest of the layer, from q/k/v (may change in place) to its output (n, hidden_size).

        The steps' keys and values are stored in the layer ``kv_index`` of their caches.
        ``y``: (n, num_targets * rank_down), added through B; None for an unadapted layer.
        """
        if y is not None:
            for rows, columns, lora_b in self.lora_B:
                if y.shape[0] == 1:
                    # In place, and not addmv_: that is several times slower in bfloat16.
                    qkv[:, rows].addmm_(y[:, columns], lora_b.T)
                else:
                    qkv[:, rows] += linear(y[:, columns], lora_b)
        attended = self._attend(qkv.to(batch.rotary.dtype), batch, kv_index)
        attended = attended.to(hidden_states.dtype)
        hidden_states = hidden_states + linear(attended, self.output_weight, self.output_bias)
        normed = F.rms_norm(
            hidden_states, self.post_norm.shape, self.post_norm, self.config.rms_norm_eps
        )
        gate, up = linear(normed, self.gate_up_weight, self.gate_up_bias).chunk(2, dim=-1)
        return hidden_states + linear(F.silu(gate) * up, self.down_weight, self.down_bias)

    def _attend(self, qkv: torch.Tensor, batch: BatchContext, kv_index: int) -> torch.Tensor:
        """Attention of every step to its own sequence: (n, num_heads * head_dim).

        One call a step: on a CPU neither padding steps to one length nor masking the joined
        keys of all is faster, since both copy every cache. (On CUDA
        ``torch.nn.attention.varlen.varlen_attn`` takes a batch in one call, of keys and values
        that lie in pages of one tensor.)
        """
        config = self.config
        num_q, num_kv = config.num_heads, config.num_kv_heads
        heads = qkv.view(-1, num_q + 2 * num_kv, config.head_dim)
        queries, queries_keys = heads[:, :num_q], heads[:, : num_q + num_kv]
        if self.q_norm is not None and self.k_norm is not None:
            shape, eps = self.q_norm.shape, config.rms_norm_eps
            keys = heads[:, num_q : num_q + num_kv]
            queries.copy_(F.rms_norm(queries, shape, self.q_norm, eps))
            keys.copy_(F.rms_norm(keys, shape, self.k_norm, eps))
        apply_rotary_(queries_keys, batch.rotary)
        # Query heads that share a key head: (n, num_kv, group, head_dim).
        grouped = queries.view(-1, num_kv, num_q // num_kv, config.head_dim)
        keys_values = heads[:, num_q:].transpose(0, 1)
        if len(batch.steps) == 1:
            return self._attend_step(batch.steps[0], grouped, keys_values, kv_index)
        parts = zip(
            batch.steps,
            grouped.split_with_sizes(batch.num_rows),
            keys_values.split_with_sizes(batch.num_rows, dim=1),
            strict=True,
        )
        return torch.cat([self._attend_step(*part, kv_index) for part in parts])

    def _attend_step(
        self, step: StepContext, queries: torch.Tensor, keys_values: torch.Tensor, kv_index: int
    ) -> torch.Tensor:
        step.kv.store(kv_index, step.position, keys_values)
        visible = step.sliding if self.sliding else step.full
        n = step.num_positions
        keys, values = step.kv.read(kv_index, visible.start, step.position + n)
        if n == 1:  # the heads of a group take the place of rows: keys are read once for all
            attended = F.scaled_dot_product_attention(queries, keys, values)
            return attended.reshape(1, -1)  # a view on a CPU, not everywhere
        shape = (-1, queries.shape[2], -1, -1)
        attended = F.scaled_dot_product_attention(
            queries.permute(1, 2, 0, 3),  # (num_kv, group, n, head_dim)
            keys.transpose(0, 1).expand(shape),
            values.transpose(0, 1).expand(shape),
            attn_mask=visible.mask,
        )
        return attended.permute(2, 0, 1, 3).reshape(n, -1)


def decoder_frequencies(config: DecoderConfig, device: torch.device) -> torch.Tensor:
    """Rotary frequencies of a decoder on ``device``."""
    return inverse_frequencies(config.rope, config.head_dim).to(device)
