"""The LM head of several sequences' steps that end together."""

from __future__ import annotations

import asyncio

import pytest
import torch

from privatelora.runtime.shared_head import SharedHead
from tests.unit.world import World, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")


class CountingEnds:
    """Ends that count the rows of each product."""

    def __init__(self, split: World) -> None:
        self.ends = split.ends()
        self.products: list[int] = []

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.products.append(len(hidden_states))
        if hidden_states.isnan().any():
            raise MemoryError("no room")
        return self.ends.logits(hidden_states)


def head_of(ends: CountingEnds) -> SharedHead:
    return SharedHead(ends)  # type: ignore[arg-type]


async def test_those_that_are_there_together_share_a_product() -> None:
    split = world()
    ends = CountingEnds(split)
    head = head_of(ends)
    hidden_states = [torch.randn(rows, split.config.hidden_size) for rows in (1, 3, 1, 2)]
    found = await asyncio.gather(*map(head.logits, hidden_states))
    assert ends.products == [7]
    for rows, logits in zip(hidden_states, found, strict=True):
        torch.testing.assert_close(logits, ends.ends.logits(rows))
    await head.logits(hidden_states[0])
    assert ends.products == [7, 1]


async def test_who_has_gone_is_left_out() -> None:
    split = world()
    ends = CountingEnds(split)
    head = head_of(ends)
    gone, stays = [
        asyncio.create_task(head.logits(torch.randn(1, split.config.hidden_size))) for _ in range(2)
    ]
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stays).shape == (1, split.config.vocab_size)
    assert ends.products == [1]


async def test_a_failure_reaches_everybody() -> None:
    split = world()
    head = head_of(CountingEnds(split))
    rows = torch.full((1, split.config.hidden_size), torch.nan)
    outcomes = await asyncio.gather(head.logits(rows), head.logits(rows), return_exceptions=True)
    assert all(isinstance(outcome, MemoryError) for outcome in outcomes)
