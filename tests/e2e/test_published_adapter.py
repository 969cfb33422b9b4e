"""An adapter file of the published system, served split, is what that system computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from privatelora.runtime.cloud import Cloud
from privatelora.runtime.config import CloudConfig, EdgeConfig
from privatelora.runtime.edge import Edge
from tests.e2e.processes import MAIN, Commands
from tests.e2e.reference import greedy_with_logits
from tests.e2e.test_equality import FP32, NUM_TOKENS, PROMPT, follow
from tests.partition.tiny import save_tiny, tiny_model

RANK = 6


class PublishedProjection(nn.Module):
    """A projection with the published system's three matrices beside it."""

    def __init__(self, base: nn.Linear, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_mobile = nn.Linear(RANK, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.lora_B(self.lora_mobile(self.lora_A(x)))
        out: torch.Tensor = self.base(x)
        return out + self.scaling * added


def published(layers: tuple[int, ...], scaling: float) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny Llama with such projections, and the state dict of its adapter alone."""
    model = tiny_model("llama")
    state = {}
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        attention = model.model.layers[layer].self_attn
        for target in "qkv":
            adapted = PublishedProjection(getattr(attention, f"{target}_proj"), scaling)
            setattr(attention, f"{target}_proj", adapted)
            for part in ("lora_A", "lora_mobile", "lora_B"):
                weight = getattr(adapted, part).weight
                with torch.no_grad():
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
                name = f"model.layers.{layer}.self_attn.{target}_lora.{part}.weight"
                state[name] = weight.detach().clone()
    return model.eval(), state


async def test_split_logits_are_the_published_monoliths(commands: Commands, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    reference, state = published((0, 1, 3), scaling=0.5)
    torch.save(state, tmp_path / "gsm8k.bin")

    imported, shards = tmp_path / "imported", tmp_path / "shards"
    sizes = ("--num-layers", 4, "--scaling", 0.5)
    result = commands.run(MAIN, "adapter", "import", tmp_path / "gsm8k.bin", imported, *sizes)
    assert (result.code, result.err) == (0, "")
    options = ("--plan", imported / "plan.yaml", "--basis", imported / "basis.safetensors")
    result = commands.run(MAIN, "partition", model, shards, *options)
    assert (result.code, result.err) == (0, "")

    cloud = Cloud(CloudConfig(listen="inproc://published", shard=shards / "cloud"))
    async with await cloud.listen() as listener:
        edge = Edge(
            EdgeConfig(
                cloud=listener.address,
                shard=shards / "edge",
                adapter=imported / "adapter.safetensors",
                payload=FP32,
            )
        )
        try:
            tokens, logits = await follow(edge.model, NUM_TOKENS)
        finally:
            await edge.aclose()
    expected_tokens, expected_logits = greedy_with_logits(reference, PROMPT, NUM_TOKENS)
    assert tokens == expected_tokens
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    _, base_logits = greedy_with_logits(tiny_model("llama"), PROMPT, 1)
    assert (base_logits - expected_logits[: len(PROMPT)]).abs().max() > 1
