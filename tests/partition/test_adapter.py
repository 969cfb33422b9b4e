"""Adapter files: private, whole, and refused where they do not fit."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from privatelora.errors import PartitionError
from privatelora.partition.adapter import (
    Adapter,
    init_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from privatelora.partition.plan import Plan
from privatelora.partition.shard import open_shard
from tests.partition.shards import Command, split

PLAN = Plan(num_layers=6, layers=(0, 2, 5), targets=("q", "v"), rank_up=5, rank_down=3, every=2)
BASIS, MODEL = "b" * 64, "e" * 64


def make(path: Path, plan: Plan = PLAN, model: str | None = MODEL) -> Adapter:
    adapter = init_adapter(plan, BASIS, model, std=0.5, seed=1)
    save_adapter(path, adapter)
    return adapter


def test_a_fresh_adapter_is_the_base_model() -> None:
    adapter = init_adapter(PLAN, BASIS, MODEL)
    assert adapter.weights.keys() == {(layer, t) for layer in (0, 2, 5) for t in ("q", "v")}
    for weight in adapter.weights.values():
        assert weight.shape == (3, 5)
        assert weight.dtype == torch.float32
        assert weight.numpy().tobytes() == bytes(60)  # zeros, none of them negative
    assert sum(w.numel() for w in adapter.weights.values()) == PLAN.num_parameters


def test_a_random_adapter_follows_its_seed() -> None:
    plan = PLAN.model_copy(update={"rank_up": 50, "rank_down": 40})
    first, again, other = (init_adapter(plan, BASIS, None, std=0.1, seed=s) for s in (1, 1, 2))
    values = torch.cat([weight.flatten() for weight in first.weights.values()])
    assert abs(float(values.mean())) < 0.005
    assert abs(float(values.std()) - 0.1) < 0.005
    for key, weight in first.weights.items():
        assert torch.equal(weight, again.weights[key])
        assert not torch.equal(weight, other.weights[key])


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layers=st.sets(st.integers(0, 9), min_size=1),
    targets=st.sampled_from([("q",), ("k", "v"), ("q", "k", "v")]),
    rank_up=st.integers(1, 9),
    rank_down=st.integers(1, 9),
    every=st.integers(1, 4),
    scaling=st.floats(-10, 10),
    model=st.sampled_from([None, MODEL]),
)
def test_what_is_saved_is_loaded(
    tmp_path: Path, layers: set[int], model: str | None, **options: Any
) -> None:
    plan = Plan(num_layers=10, layers=tuple(sorted(layers)), **options)
    saved = make(tmp_path / "adapter", plan, model)
    placed = plan.model_copy(update={"edge_first": 2, "edge_last": 1})
    loaded = load_adapter(tmp_path / "adapter", placed, BASIS, MODEL)
    assert loaded.plan == plan
    assert (loaded.basis_fingerprint, loaded.model_fingerprint) == (BASIS, model)
    assert loaded.weights.keys() == saved.weights.keys()
    assert all(torch.equal(loaded.weights[key], saved.weights[key]) for key in saved.weights)


def test_the_file_is_plain_safetensors_under_the_documented_names(tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter")
    name = "model.layers.2.self_attn.v_proj.lora_M.weight"
    assert torch.equal(stored[name], adapter.weights[2, "v"])
    assert len(stored) == 6
    with safe_open(tmp_path / "adapter", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["arrangement"]) == PLAN.arrangement()
    assert metadata["format_version"] == "1"


def test_the_file_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_bytes(b"older and open to all")
    path.chmod(0o666)
    before = os.umask(0)
    try:
        make(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["adapter"]


def test_trained_weights_are_saved_from_any_dtype(tmp_path: Path) -> None:
    weights = {
        (layer, target): torch.nn.Parameter(torch.full((5, 3), 0.5, dtype=torch.bfloat16)).T
        for layer in PLAN.layers
        for target in PLAN.targets
    }
    save_adapter(tmp_path / "adapter", Adapter(weights, PLAN, BASIS, None))
    loaded = read_adapter(tmp_path / "adapter")
    assert torch.equal(loaded.weights[0, "q"], torch.full((3, 5), 0.5))


def test_a_failed_write_keeps_the_old_adapter(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    make(path)
    before = path.read_bytes()
    (tmp_path / "taken").mkdir()
    with pytest.raises(PartitionError, match="cannot write"):
        make(tmp_path / "taken")
    with pytest.raises(PartitionError, match="cannot write"):
        make(tmp_path / "nowhere" / "adapter")
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["adapter", "taken"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"every": 1}, r"another arrangement: every is 2 there and 1 in the shard"),
        ({"layers": (0, 2, 4)}, r"layers is \[0, 2, 5\] there and \[0, 2, 4\]"),
        ({"targets": ("q", "k")}, r"targets is \['q', 'v'\] there"),
        ({"rank_up": 4}, "rank_up is 5 there and 4"),
        ({"scaling": 2.0}, r"scaling is 1\.0 there and 2\.0"),
        ({"num_layers": 7}, "num_layers is 6 there and 7"),
    ],
)
def test_another_arrangement_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    make(tmp_path / "adapter")
    plan = Plan.model_validate(PLAN.model_dump() | change)
    with pytest.raises(PartitionError, match=reason) as error:
        load_adapter(tmp_path / "adapter", plan, BASIS, MODEL)
    assert "use another adapter" in str(error.value)


def test_another_basis_or_model_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "adapter")
    with pytest.raises(PartitionError, match="made for basis bbbbbbbbbbbb, here is cccccccc"):
        load_adapter(tmp_path / "adapter", PLAN, "c" * 64, MODEL)
    with pytest.raises(PartitionError, match="made for model eeeeeeeeeeee, here is cccccc"):
        load_adapter(tmp_path / "adapter", PLAN, BASIS, "c" * 64)


def rewrite(
    path: Path,
    metadata: dict[str, str | None] | None = None,
    change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
) -> None:
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, framework="pt") as file:
        known = file.metadata() | (metadata or {})
    save_file(tensors, path, {key: value for key, value in known.items() if value is not None})


Q0 = "model.layers.0.self_attn.q_proj.lora_M.weight"


@pytest.mark.parametrize(
    ("metadata", "change", "reason"),
    [
        ({"format": None}, None, "is not a PrivateLoRA adapter; make one with"),
        ({"format_version": "2"}, None, "format version '2', this program reads 1"),
        ({"arrangement": "{"}, None, "is damaged: arrangement: "),
        ({"arrangement": None}, None, "is damaged: arrangement: "),
        ({"arrangement": '{"num_layers": 3, "layers": [7]}'}, None, "layer 7 does not exist"),
        ({"basis_fingerprint": None}, None, "does not name its basis"),
        (None, lambda t: t.pop(Q0), "lora_M.weight is missing"),
        (None, lambda t: t.update(more=torch.ones(1)), "tensor more is not expected"),
        (
            None,
            lambda t: t.update({Q0: torch.ones(5, 3)}),
            r"has shape \(5, 3\), expected \(3, 5\)",
        ),
        (None, lambda t: t.update({Q0: torch.ones(3, 5).half()}), "is F16, expected F32"),
        (None, lambda t: t[Q0].fill_(torch.nan), "infinite values or NaN"),
    ],
)
def test_a_file_that_is_wrong_is_refused(
    tmp_path: Path,
    metadata: dict[str, str | None] | None,
    change: Callable[[dict[str, torch.Tensor]], object] | None,
    reason: str,
) -> None:
    path = tmp_path / "adapter"
    make(path)
    rewrite(path, metadata, change or (lambda tensors: None))
    with pytest.raises(PartitionError, match=reason) as error:
        read_adapter(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 1999), value=st.integers(0, 255), cut=st.booleans())
def test_damage_is_refused_or_harmless(
    tmp_path: Path, position: int, value: int, cut: bool
) -> None:
    path = tmp_path / "adapter"
    make(path)
    damaged = bytearray(path.read_bytes())
    position %= len(damaged)
    damaged[position] = value
    path.write_bytes(damaged[:position] if cut else damaged)
    try:
        adapter = read_adapter(path)
    except PartitionError:
        return
    assert all(weight.shape == (3, 5) for weight in adapter.weights.values())


def test_the_commands_make_and_show_an_adapter(
    command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    manifests = split(tiny_llama, tmp_path / "shards", layers="0,2", every="all")
    edge, path = tmp_path / "shards" / "edge", tmp_path / "my adapter"
    made = command("adapter", "init", edge, path, "--json")
    assert made.code == 0, made.err
    assert made.json == {"adapter": str(path), "parameters": 2 * 3 * 64}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    manifest = open_shard(edge, "edge").manifest
    adapter = load_adapter(
        path, manifest.plan, manifest.basis_fingerprint, manifest.model_fingerprint
    )
    assert not any(weight.any() for weight in adapter.weights.values())

    again = command("adapter", "init", edge, path)
    assert again.code == 1
    assert again.err.startswith("error: ")
    assert "exists" in again.err

    other = tmp_path / "random"
    assert command("adapter", "init", edge, other, "--std", 0.5, "--seed", 3).code == 0
    shown = command("adapter", "inspect", other, "--json").json
    assert shown["arrangement"] == manifests["edge"].plan.arrangement()
    assert shown["basis_fingerprint"] == manifest.basis_fingerprint
    assert shown["model_fingerprint"] == manifest.model_fingerprint
    assert shown["parameters"] == 384
    weights = load_file(other)
    for layer in ("0", "2"):
        for target in ("q", "k", "v"):
            weight = weights[f"model.layers.{layer}.self_attn.{target}_proj.lora_M.weight"]
            assert shown["norms"][layer][target] == pytest.approx(float(weight.norm()), rel=1e-5)

    table = command("adapter", "inspect", other)
    assert table.code == 0
    assert f"{shown['norms']['2']['v']:.4g}" in table.out
    assert manifest.basis_fingerprint in table.out


def test_an_adapter_is_made_for_an_edge_shard_only(
    command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    split(tiny_llama, tmp_path / "shards")
    result = command("adapter", "init", tmp_path / "shards" / "cloud", tmp_path / "adapter")
    assert result.code == 1
    assert "is the cloud shard" in result.err
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "arguments",
    [("partition",), ("adapter", "init"), ("adapter", "inspect"), ("adapter", "import")],
)
def test_every_command_has_help_with_an_example(command: Command, arguments: tuple[str]) -> None:
    result = command(*arguments, "--help")
    assert result.code == 0
    assert f"privatelora {' '.join(arguments)} " in result.out.replace("\n", "")
