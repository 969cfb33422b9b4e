"""A causal language model whose frozen stack is on a cloud, to train as any other module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from privatelora.errors import RequestError
from privatelora.partition.basis import lora_a_name
from privatelora.partition.layout import folded_norm_name
from privatelora.partition.models.families import EMBED_TOKENS, FINAL_NORM, LM_HEAD
from privatelora.partition.plan import ExchangePoint, Plan, Target
from privatelora.partition.shard import Shard
from privatelora.runtime.engine import Engine
from privatelora.runtime.training_layers import PackedBatch, frozen_linear, run_layer
from privatelora.runtime.wire.messages import BatchSequence, Fingerprints
from privatelora.training.split.client import SplitClient, SplitStep
from privatelora.training.split.exchange import reply, stack


class _ThroughCloud(torch.autograd.Function):
    """The cloud's layers as one operation: hidden states, opening y and M in, what it gives out."""

    @staticmethod
    def forward(
        ctx: Any,
        client: SplitClient,
        sequences: Sequence[BatchSequence],
        indices: Sequence[int],
        backward: bool,
        hidden_states: torch.Tensor,
        opening: torch.Tensor | None,
        *stacked: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = SplitStep(
            sequences,
            hidden_states.detach(),
            None if opening is None else opening.detach(),
            {i: tensor.detach() for i, tensor in zip(indices, stacked, strict=True)},
            backward,
        )
        ctx.client, ctx.step, ctx.indices = client, step, indices
        return client.forward(step)

    @staticmethod
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[Any, ...]:
        found = ctx.client.backward(ctx.step, *of_outputs)
        of_stacked = [found.stacked[i] for i in ctx.indices]
        return None, None, None, None, found.hidden_states, found.opening, *of_stacked


@dataclass(frozen=True)
class _Packed:
    """The unpadded tokens of a batch, and where the last ones of each row are."""

    ids: torch.Tensor
    sequences: tuple[BatchSequence, ...]
    wanted: torch.Tensor
    """Which of the rows of the batch are wanted back."""
    places: torch.Tensor
    """Where those go among (batch * keep) rows."""
    keep: int


class SplitCausalLM(nn.Module):
    """Embedding, M, LM head and the edge's own layers here; everything else on the cloud.

    Its parameters are ``lora_M`` alone: M by layer and target, float32, zero at first. They may be
    on any device; what is frozen is computed on ``device``, and what comes out is put where the
    tokens came from.
    """

    def __init__(self, shard: Shard, client: SplitClient, device: torch.device, dtype: torch.dtype):
        """Take the edge's ``shard``. ``dtype``: what is frozen is computed in."""
        super().__init__()
        manifest = shard.manifest
        self.plan: Plan = manifest.plan
        self.fingerprints = Fingerprints(*manifest.fingerprints)
        self.tokenizer_dir: Path = shard.tokenizer_dir
        self.client = client
        self.device = device
        self._config = config = manifest.config
        self._dtype = dtype
        tensors = shard.load(device, dtype)
        self._embed_tokens = tensors[EMBED_TOKENS]
        self._norm = tensors[FINAL_NORM]
        self.lm_head = self._embed_tokens if config.tie_word_embeddings else tensors[LM_HEAD]
        """Frozen (vocab_size, hidden_size)."""
        plan = self.plan
        self._first = Engine(config, plan, plan.edge_first_layers, tensors, device, dtype)
        self._last = Engine(config, plan, plan.edge_last_layers, tensors, device, dtype)
        norm_name = folded_norm_name(plan)
        self._folded: tuple[ExchangePoint, torch.Tensor, torch.Tensor] | None = None
        if plan.folded_point is not None and norm_name is not None:
            lora_a = tensors[lora_a_name(plan.folded_point)]
            self._folded = plan.folded_point, tensors[norm_name], lora_a
        self.lora_M = nn.ParameterDict(
            {
                f"{layer}_{target}": nn.Parameter(torch.zeros(plan.rank_down, plan.rank_up))
                for layer in plan.layers
                for target in plan.targets
            }
        )

    @property
    def max_positions(self) -> int:
        """The model's context."""
        return self._config.max_positions

    def weights(self) -> dict[tuple[int, Target], torch.Tensor]:
        """M by layer and target: float32 (rank_down, rank_up), on the CPU, a copy."""
        return {key: M.detach().to("cpu", copy=True) for key, M in self._matrices().items()}

    def close(self) -> None:
        """Leave the cloud. May be repeated."""
        self.client.close()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits (B, K, vocab_size) of the last K = ``logits_to_keep`` positions, or of all for 0.

        ``input_ids``: (B, T) int64, padded on the left where ``attention_mask`` (B, T) is 0; logits
        of padding are those of a zero hidden state. Raises RequestError for a batch that cannot be,
        and as ``SplitClient.forward``.
        """
        normed = self._run(input_ids, attention_mask, logits_to_keep)
        logits = frozen_linear(normed.flatten(0, 1), self.lm_head).view(*normed.shape[:2], -1)
        return CausalLMOutput(logits=logits.to(input_ids.device))

    @torch.no_grad()
    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        """What ``forward`` multiplies with the LM head: (B, keep, hidden_size), 0 for padding."""
        return self._run(input_ids, attention_mask, keep).to(input_ids.device)

    def _matrices(self) -> dict[tuple[int, Target], torch.Tensor]:
        return {
            (layer, target): self.lora_M[f"{layer}_{target}"]
            for layer in self.plan.layers
            for target in self.plan.targets
        }

    def _run(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        """The normed final hidden states (B, K, hidden_size) of the last K positions."""
        packed = self._pack(input_ids, attention_mask, keep)
        plan, matrices = self.plan, self._matrices()
        stacked = {
            point.index: stack(plan, point, matrices).to(self.device) for point in plan.points
        }
        lengths = [one.num_rows for one in packed.sequences]
        batch = None
        if plan.edge_first or plan.edge_last:
            batch = PackedBatch(self._config, lengths, self._first.frequencies, self._dtype)
        y: dict[int, torch.Tensor] = {}
        hidden_states = F.embedding(packed.ids, self._embed_tokens)
        hidden_states = self._run_layers(self._first, hidden_states, y, stacked, batch)
        if self._folded is not None:
            point, weight, lora_a = self._folded
            normed = self._normed(hidden_states, weight)
            self._supply(y, point.layers, self._reply(normed, lora_a, stacked[point.index]))
        hidden_states = self._through_cloud(hidden_states, y, stacked, packed)
        hidden_states = self._run_layers(self._last, hidden_states, y, stacked, batch)
        if plan.edge_last:
            hidden_states = hidden_states.index_select(0, packed.wanted)
        normed = self._normed(hidden_states, self._norm)
        num_places = len(input_ids) * packed.keep
        if len(normed) < num_places:
            empty = normed.new_zeros(num_places, normed.shape[1])
            normed = empty.index_copy(0, packed.places, normed)
        return normed.view(len(input_ids), packed.keep, -1)

    def _through_cloud(
        self,
        hidden_states: torch.Tensor,
        y: dict[int, torch.Tensor],
        stacked: dict[int, torch.Tensor],
        packed: _Packed,
    ) -> torch.Tensor:
        plan = self.plan
        opening = None
        if plan.opening_layers:
            opening = torch.cat([y.pop(layer) for layer in plan.opening_layers], dim=1)
        sequences = packed.sequences
        if plan.edge_last:  # whose layers need every row, for its keys and values
            sequences = tuple([BatchSequence(one.num_rows, one.num_rows) for one in sequences])
        indices = [point.index for point in plan.wire_points]
        of_points = [stacked[index] for index in indices]
        leaves = [hidden_states, *([] if opening is None else [opening]), *of_points]
        backward = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
        through: Any = _ThroughCloud.apply  # its signature is that of Function
        hidden_states, late_y = through(
            self.client, sequences, indices, backward, hidden_states, opening, *of_points
        )
        for point in plan.wire_points:
            if late := plan.span_in(point, plan.edge_last_layers):
                self._supply(y, late, late_y)
        return hidden_states

    def _run_layers(
        self,
        engine: Engine,
        hidden_states: torch.Tensor,
        y: dict[int, torch.Tensor],
        stacked: dict[int, torch.Tensor],
        batch: PackedBatch | None,
    ) -> torch.Tensor:
        """Run the layers the edge owns on one side of the cloud."""
        for index, layer in engine.decoder.items():
            if batch is None:
                raise RuntimeError("layers without a batch")
            if index in engine.points:
                point, lora_a = engine.points[index]
                normed = layer.norm_input(hidden_states)
                self._supply(y, point.layers, self._reply(normed, lora_a, stacked[point.index]))
            of_layer = y.pop(index, None)
            if of_layer is not None:
                of_layer = of_layer.to(self._dtype)
            hidden_states = run_layer(layer, hidden_states, of_layer, batch)
        return hidden_states

    def _reply(
        self, normed: torch.Tensor, lora_a: torch.Tensor, stacked: torch.Tensor
    ) -> torch.Tensor:
        return reply(self.plan, frozen_linear(normed, lora_a), stacked)

    def _supply(self, y: dict[int, torch.Tensor], layers: Sequence[int], of: torch.Tensor) -> None:
        y.update(zip(layers, of.chunk(len(layers), dim=1), strict=True))

    def _normed(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, weight.shape, weight, self._config.rms_norm_eps)

    def _pack(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, keep: int
    ) -> _Packed:
        longest = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.to("cpu", torch.bool)
        lengths: list[int] = mask.sum(dim=1).tolist()
        if min(lengths, default=0) == 0 or not bool((mask[:, 1:] >= mask[:, :-1]).all()):
            raise RequestError("every row of a batch needs tokens, and its padding on the left")
        if longest > self._config.max_positions:
            raise RequestError(
                f"a sequence of {longest} positions is longer than the model's context of "
                f"{self._config.max_positions}"
            )
        ids = input_ids.to("cpu")[mask]
        if not 0 <= int(ids.min()) <= int(ids.max()) < self._config.vocab_size:
            raise RequestError(f"token ids must lie in 0 to {self._config.vocab_size - 1}")
        keep = min(keep, longest) or longest
        sequences = tuple([BatchSequence(length, min(length, keep)) for length in lengths])
        wanted, places, start = [], [], 0
        for index, one in enumerate(sequences):
            last = torch.arange(one.num_output_rows)
            wanted.append(last + start + one.num_rows - one.num_output_rows)
            places.append(last + (index + 1) * keep - one.num_output_rows)
            start += one.num_rows
        return _Packed(
            ids.to(self.device),
            sequences,
            torch.cat(wanted).to(self.device),
            torch.cat(places).to(self.device),
            keep,
        )
