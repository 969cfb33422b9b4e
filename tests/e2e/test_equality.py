"""Both sides together compute what transformers computes in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from privatelora.runtime.cloud import Cloud
from privatelora.runtime.config import CloudConfig, EdgeConfig
from privatelora.runtime.edge import Edge
from privatelora.runtime.language_model import LanguageModel
from privatelora.runtime.link_config import PayloadConfig
from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.reference import greedy_with_logits
from tests.partition.tiny import FAMILIES

FP32 = PayloadConfig.model_validate("fp32")
PROMPT = [1, *range(20, 58)]
NUM_TOKENS = 32

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "per-layer": {"every": 1},
    "every-2": {"every": 2},
    "every-all": {"every": "all"},
    "rank-up-larger": {"every": 1, "rank_up": 12, "rank_down": 5},
    "rank-down-larger": {"every": 2, "rank_up": 5, "rank_down": 12},
    "edge-first-2": {"every": 1, "edge_first": 2},
    "edge-last-1": {"every": 1, "edge_last": 1},
    "edge-both": {"every": 2, "edge_first": 2, "edge_last": 1},
    "span-over-both-borders": {"every": 3, "edge_first": 1, "edge_last": 1},
    "all-over-both-borders": {"every": "all", "edge_first": 2, "edge_last": 1},
    "subset": {"every": 1, "layers": "1,3"},
    "subset-grouped": {"every": 2, "layers": "0,2-3", "edge_first": 1},
    "one-target": {"every": 1, "targets": "v", "scaling": 1.7},
    "two-targets-grouped": {"every": 2, "targets": "q,v", "scaling": 0.5},
}


async def follow(model: LanguageModel, num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """As ``greedy_with_logits``, with the prompt in two steps."""
    sequence = await model.open_sequence(len(PROMPT) + num_tokens)
    try:
        cut = len(PROMPT) // 2
        logits = [await sequence.forward(PROMPT[:cut], 0, "all")]
        logits.append(await sequence.forward(PROMPT[cut:], cut, "all"))
        tokens = [int(logits[-1][-1].argmax())]
        while len(tokens) < num_tokens:
            position = len(PROMPT) + len(tokens) - 1
            logits.append(await sequence.forward(tokens[-1:], position, "last"))
            tokens.append(int(logits[-1][-1].argmax()))
    finally:
        await sequence.aclose()
    return tokens, torch.cat(logits)


async def assert_equal(address: str, deployment: Deployment, reference: Any) -> None:
    """An edge of ``deployment``, against the cloud at ``address``, says what transformers says."""
    edge = Edge(
        EdgeConfig(
            cloud=address,
            shard=deployment.edge_shard,
            adapter=deployment.adapter_file,
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


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
async def test_split_equals_transformers(family: str, arrangement: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank_up": 8, "rank_down": 8, **ARRANGEMENTS[arrangement]}
    deployment, reference = tiny_deployment(family, tmp_path, **options)
    address = f"inproc://{family}-{arrangement}"
    cloud = Cloud(CloudConfig(listen=address, shard=deployment.cloud_shard))
    async with await cloud.listen() as listener:
        await assert_equal(listener.address, deployment, reference)
