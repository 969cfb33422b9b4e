"""Answering the exchange requests of several steps with one product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from privatelora.errors import ConfigError, RemoteProtocolError
from privatelora.runtime.exchange import ExchangeAnswers, PrivateMatrices, StepExchanges
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.wire.messages import TensorPayload
from tests.unit.world import BOTH_BORDERS, CPU, World, world


def answers_of(split: World) -> ExchangeAnswers:
    return ExchangeAnswers(split.plan, CPU)


def requests(
    split: World, *sizes: int, adapters: Sequence[PrivateMatrices | None] | None = None
) -> list[tuple[StepExchanges, TensorPayload]]:
    """Of the world's adapter, or of these in turn."""
    generator = torch.Generator().manual_seed(5)
    z = [torch.randn(rows, split.plan.z_size, generator=generator) for rows in sizes]
    of = itertools.cycle(adapters or [split.matrices()])
    return [(StepExchanges(next(of), len(rows), "fp32"), pack(rows, "fp32")) for rows in z]


def read(y: TensorPayload | ConfigError) -> torch.Tensor:
    assert isinstance(y, TensorPayload), y
    return unpack(y, CPU, torch.float32)


@pytest.mark.parametrize("options", [{}, {"every": 4}, BOTH_BORDERS, {**BOTH_BORDERS, "every": 4}])
def test_together_they_get_what_each_gets_alone(options: dict[str, Any]) -> None:
    split = world(**options)
    plan, answers = split.plan, answers_of(split)
    for point in plan.wire_points:
        together, alone = requests(split, 1, 7, 1, 3), requests(split, 1, 7, 1, 3)
        found = answers(point.index, together)
        for (step, _), y, single in zip(together, found, alone, strict=True):
            z = unpack(single[1], CPU, torch.float32)
            whole = split.matrices().reply(point, z)
            late = [whole[:, :0], *(step.late_y[layer] for layer in sorted(step.late_y))]
            torch.testing.assert_close(torch.cat([read(y), *late], dim=1), whole)
            [by_itself] = answers(point.index, [single])
            torch.testing.assert_close(read(y), read(by_itself))
            assert step.late_y.keys() == set(point.layers) - set(plan.cloud_layers)


def test_each_gets_what_its_own_adapter_says() -> None:
    split = world()
    point = split.plan.wire_points[0]
    other = PrivateMatrices(split.plan, {key: 2 * m for key, m in split.weights.items()})
    own = split.matrices()
    adapters = [own, other, None]
    asked = requests(split, 1, 7, 1, 3, 2, adapters=adapters)
    found = [read(y) for y in answers_of(split)(point.index, asked)]
    for (_, payload), y, factor in zip(asked, found, [1, 2, 0, 1, 2], strict=True):
        z = unpack(payload, CPU, torch.float32)
        torch.testing.assert_close(y, factor * own.reply(point, z))


def test_each_is_packed_as_its_step_wants() -> None:
    split = world()
    asked = requests(split, 2, 2)
    asked[1] = (replace(asked[1][0], codec="int8"), asked[1][1])
    point = split.plan.wire_points[0].index
    assert [y.codec for y in answers_of(split)(point, asked) if isinstance(y, TensorPayload)] == [
        "fp32",
        "int8",
    ]


def test_a_number_that_does_not_fit_concerns_only_its_step() -> None:
    split = world()
    point = split.plan.wire_points[0].index
    asked = requests(split, 1, 1, 1)
    z = unpack(asked[1][1], CPU, torch.float32) * 1e9
    asked[1] = (StepExchanges(split.matrices(), 1, "fp16"), pack(z, "fp32"))
    first, refused, last = answers_of(split)(point, asked)
    assert isinstance(refused, ConfigError)
    assert "fp16 cannot carry" in str(refused)
    alone = requests(split, 1, 1, 1)
    for y, single in [(first, alone[0]), (last, alone[2])]:
        torch.testing.assert_close(read(y), read(answers_of(split)(point, [single])[0]))


def test_what_cannot_be_asked_is_refused() -> None:
    split = world()
    own = split.plan.folded_point
    assert own is not None
    for index in (own.index, 99):
        with pytest.raises(RemoteProtocolError, match=f"point {index}, which is not its own"):
            answers_of(split)(index, requests(split, 1))
    point = split.plan.wire_points[0].index
    asked = requests(split, 2, 3)
    asked[1] = (StepExchanges(None, 2, "fp32"), asked[1][1])
    with pytest.raises(RemoteProtocolError, match=r"z of 3 x 24 came where 2 x 24 was due"):
        answers_of(split)(point, asked)
