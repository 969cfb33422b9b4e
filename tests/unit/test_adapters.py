"""Several adapters, and none, over one connection to one cloud."""

from __future__ import annotations

import asyncio

import pytest

from privatelora.runtime.exchange import PrivateMatrices
from privatelora.runtime.language_model import UnsplitModel
from privatelora.runtime.split_model import SplitModel
from tests.unit.world import BOTH_BORDERS, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [5, 3, 77, 21, 4, 60, 8]


@pytest.mark.parametrize("options", [{}, {"every": 4}, BOTH_BORDERS])
async def test_each_says_what_it_says_alone(options: dict[str, int]) -> None:
    split = world(**options)
    own = split.matrices()
    other = PrivateMatrices(split.plan, {key: -2 * m for key, m in split.weights.items()})
    adapters = [own, other, None]
    expected = [
        await solo(UnsplitModel(split.ends(), split.engine(), matrices), PROMPT, [9], [11])
        for matrices in adapters
    ]
    assert not any(logits.allclose(expected[0], atol=1e-2) for logits in expected[1:])
    async with serving(split.service().handle) as address:
        first = split.split(address)
        models = [SplitModel(first.parts, first.access, matrices) for matrices in adapters]
        for _ in range(2):
            found = await asyncio.gather(*(solo(model, PROMPT, [9], [11]) for model in models))
            for logits, due in zip(found, expected, strict=True):
                assert_same(logits, due)
        assert first.access.sent.totals["OpenSession"][0] == 6
        await first.aclose()
