"""Plans as people write them: options, ranges of layers, YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.errors import ConfigError, PartitionError
from privatelora.partition.models.config import DecoderConfig, RopeConfig
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import (
    make_plan,
    parse_layers,
    read_plan_file,
    write_plan_file,
)

CONFIG = DecoderConfig(
    family="llama",
    hidden_size=64,
    intermediate_size=96,
    num_layers=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    max_positions=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=1e4),
)
SMALL: dict[str, Any] = {"rank_up": 8, "rank_down": 8}


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", tuple(range(12))),
        ("0-5,8,10-11", (0, 1, 2, 3, 4, 5, 8, 10, 11)),
        ("1-9:3", (1, 4, 7)),
        ("7, 3 ,3", (3, 7)),
        ("4-4", (4,)),
    ],
)
def test_layers_are_ranges_with_both_ends(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 12) == layers


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot read ''"),
        ("a-b", "cannot read 'a-b'"),
        ("1-", "cannot read '1-'"),
        ("-1", "cannot read '-1'"),
        ("5-2", "'5-2' is empty"),
        ("0-5:0", "step of 1 or more"),
        ("3,12", "layer 12 does not exist; the model has layers 0 to 11"),
        ("0-999999999", "layer 999999999 does not exist"),
    ],
)
def test_layers_that_mean_nothing_are_refused(text: str, reason: str) -> None:
    with pytest.raises(PartitionError, match="layers: ") as error:
        parse_layers(text, 12)
    assert reason in str(error.value)


@given(st.text(alphabet="0123456789-,: al", max_size=20))
def test_layers_parse_or_are_refused(text: str) -> None:
    try:
        layers = parse_layers(text, 12)
    except PartitionError:
        return
    assert list(layers) == sorted(set(layers))
    assert all(0 <= layer < 12 for layer in layers)


def test_every_all_makes_one_point() -> None:
    plan = make_plan(CONFIG, every="all", layers="2-9", **SMALL)
    assert [point.layers for point in plan.points] == [tuple(range(2, 10))]


def test_targets_come_in_any_order() -> None:
    assert make_plan(CONFIG, targets="v, q", **SMALL).targets == ("q", "v")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank_up": 0}, "rank_up: Input should be greater than 0"),
        ({"rank_up": 65}, "rank_up 65 is larger than the hidden size; choose at most 64"),
        ({"rank_down": 33}, r"rank_down 33 .* k projection \(32\); choose at most 32"),
        ({"every": 0}, "every: Input should be greater than 0"),
        ({"targets": "q,o"}, "'o' is not a projection that can be adapted"),
        ({"targets": ""}, "'' is not a projection"),
        ({"edge_first": 6, "edge_last": 6}, r"edge_first 6 \+ edge_last 6 leave the cloud no"),
        ({"edge_first": -1}, "edge_first: Input should be greater than or equal to 0"),
        ({"scaling": float("nan")}, "scaling: Input should be a finite number"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(
    options: dict[str, object], reason: str
) -> None:
    with pytest.raises(PartitionError, match=reason) as error:
        make_plan(CONFIG, **{**SMALL, **options})
    assert "\n" not in str(error.value)


def test_a_written_plan_reads_back(tmp_path: Path) -> None:
    plan = make_plan(CONFIG, layers="1-9:2", every=2, targets="q,v", scaling=0.1, **SMALL)
    write_plan_file(tmp_path / "plan.yaml", plan)
    assert read_plan_file(tmp_path / "plan.yaml").plan_for(CONFIG) == plan


def test_a_plan_file_takes_what_the_options_take(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("layers: 0-3\ntargets: q,k\nevery: all\nrank_up: 4\nrank_down: 4\n")
    plan = read_plan_file(path).plan_for(CONFIG)
    assert plan == Plan(
        num_layers=12,
        layers=(0, 1, 2, 3),
        targets=("q", "k"),
        rank_up=4,
        rank_down=4,
        every=4,
    )


def test_a_plan_file_for_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("num_layers: 32\n")
    with pytest.raises(PartitionError, match="with 32 layers, this one has 12"):
        read_plan_file(path).plan_for(CONFIG)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rank_upp: 4", r"unknown key 'rank_upp'; did you mean rank_up\b"),
        ("rank_up: many", "rank_up: "),
        ("every: some", "every: .*'all'"),
        ("- 1", "expected keys and values"),
        ("a: [", "line 1: not valid YAML"),
    ],
)
def test_a_wrong_plan_file_names_file_and_key(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as error:
        read_plan_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_plan_file(tmp_path / "nowhere.yaml")
