"""Writing shards: what goes where, in what form, and under which fingerprints."""

from __future__ import annotations

import math
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.layout import shard_shapes
from privatelora.partition.manifest import check_pair
from privatelora.partition.plan_file import make_plan
from privatelora.partition.tensor_file import TensorFileWriter
from tests.partition.shards import split
from tests.partition.tiny import FAMILIES, save_tiny, tiny_tokenizer

LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ENDS = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def layer_names(*layers: int) -> set[str]:
    return {f"model.layers.{layer}.{part}.weight" for layer in layers for part in LAYER}


def lora_b(*layers: int, targets: str = "qkv") -> set[str]:
    return {
        f"model.layers.{layer}.self_attn.{target}_proj.lora_B.weight"
        for layer in layers
        for target in targets
    }


def lora_a(*points: int) -> set[str]:
    return {f"points.{point}.lora_A.weight" for point in points}


NORM_0 = {"model.layers.0.input_layernorm.weight"}
NORM_1 = {"model.layers.1.input_layernorm.weight"}


@pytest.mark.parametrize(
    ("options", "cloud", "edge"),
    [
        pytest.param(
            {},
            layer_names(0, 1, 2, 3) | lora_b(0, 1, 2, 3) | lora_a(1, 2, 3),
            ENDS | NORM_0 | lora_a(0),
            id="per layer, first point folded",
        ),
        pytest.param(
            {"every": "all"},
            layer_names(0, 1, 2, 3) | lora_b(0, 1, 2, 3),
            ENDS | NORM_0 | lora_a(0),
            id="one point, folded",
        ),
        pytest.param(
            {"layers": "1-3", "every": 2, "targets": "q,v"},
            layer_names(0, 1, 2, 3) | lora_b(1, 2, 3, targets="qv") | lora_a(0, 1),
            ENDS,
            id="nothing to fold",
        ),
        pytest.param(
            {"edge_first": 1, "edge_last": 1},
            layer_names(1, 2) | lora_b(1, 2) | lora_a(2),
            ENDS | layer_names(0, 3) | lora_b(0, 3) | NORM_1 | lora_a(0, 1, 3),
            id="layers on both ends of the edge",
        ),
        pytest.param(
            {"edge_first": 1, "edge_last": 1, "every": 2},
            layer_names(1, 2) | lora_b(1, 2) | lora_a(1),
            ENDS | layer_names(0, 3) | lora_b(0, 3) | lora_a(0),
            id="spans across the borders",
        ),
        pytest.param(
            {"edge_first": 1, "layers": "0,2"},
            layer_names(1, 2, 3) | lora_b(2) | lora_a(1),
            ENDS | layer_names(0) | lora_b(0) | lora_a(0),
            id="first cloud layer not adapted",
        ),
    ],
)
def test_each_side_holds_what_it_computes_with(
    tiny_llama: Path, tmp_path: Path, options: dict[str, Any], cloud: set[str], edge: set[str]
) -> None:
    manifests = split(tiny_llama, tmp_path / "out", **options)
    original = load_file(tiny_llama / "model.safetensors")
    for role, names in (("cloud", cloud), ("edge", edge)):
        stored = load_file(tmp_path / "out" / role / "model.safetensors")
        assert stored.keys() == names
        assert manifests[role].tensors.keys() == names  # type: ignore[index]
        for name in names & original.keys():
            assert torch.equal(stored[name], original[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_of_any_family_is_lost(tmp_path: Path, family: str) -> None:
    model = save_tiny(family, tmp_path / "model")
    split(model, tmp_path / "out", edge_first=1, edge_last=1, layers="1-3")
    original = load_file(model / "model.safetensors")
    stored = {}
    for role in ("cloud", "edge"):
        stored.update(load_file(tmp_path / "out" / role / "model.safetensors"))
    frozen = {name: tensor for name, tensor in stored.items() if "lora" not in name}
    assert frozen.keys() == original.keys()
    assert all(torch.equal(frozen[name], original[name]) for name in original)
    tokenizer = tmp_path / "out" / "edge" / "tokenizer"
    assert (tokenizer / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "cloud" / "tokenizer").exists()


def test_the_files_are_plain_safetensors_aligned_for_mapping(
    tiny_llama: Path, tmp_path: Path
) -> None:
    split(tiny_llama, tmp_path / "out", dtype=torch.float16)
    path = tmp_path / "out" / "cloud" / "model.safetensors"
    check_alignment(path)
    shapes = {"a": (3,), "b": (32, 2), "c": (), "d": (0, 5), "e": (64,)}
    with TensorFileWriter(tmp_path / "odd", shapes, torch.float16) as writer:
        for value, name in enumerate(reversed(shapes)):
            writer.write(name, torch.full(shapes[name], float(value)))
    check_alignment(tmp_path / "odd")
    odd = load_file(tmp_path / "odd")
    assert {name: tuple(tensor.shape) for name, tensor in odd.items()} == shapes
    assert [int(odd[name].sum()) for name in ("a", "b", "c", "e")] == [4 * 3, 3 * 64, 2, 0]


def check_alignment(path: Path) -> None:
    """Tensors of whole cache lines start on one."""
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert start % 64 == 0
    with safe_open(path, framework="pt") as file:
        names = file.offset_keys()
        offset = start
        for name in names:
            nbytes = 2 * math.prod(file.get_slice(name).get_shape())
            if nbytes % 64 == 0:
                assert offset % 64 == 0, name
            offset += nbytes
    assert offset == path.stat().st_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stored_dtype_rounds_but_does_not_change_the_fingerprints(
    tiny_llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    exact = split(tiny_llama, tmp_path / "exact", basis="svd")
    rounded = split(tiny_llama, tmp_path / "rounded", basis="svd", dtype=dtype)
    check_pair(exact["cloud"].fingerprints, rounded["edge"].fingerprints)
    for role in ("cloud", "edge"):
        whole = load_file(tmp_path / "exact" / role / "model.safetensors")
        half = load_file(tmp_path / "rounded" / role / "model.safetensors")
        assert half.keys() == whole.keys()
        assert all(torch.equal(half[name], whole[name].to(dtype)) for name in whole)


def test_large_tensors_are_converted_whole(tmp_path: Path) -> None:
    """A tensor of several chunks, the last one short."""
    model = save_tiny("llama-tied", tmp_path / "model", vocab_size=40_001, tokenizer=False)
    tiny_tokenizer().save_pretrained(model)
    split(model, tmp_path / "out", dtype=torch.bfloat16)
    name = "model.embed_tokens.weight"
    stored = load_file(tmp_path / "out" / "edge" / "model.safetensors")[name]
    original = load_file(model / "model.safetensors")[name]
    assert original.numel() > 2**21
    assert torch.equal(stored, original.to(torch.bfloat16))


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = 70_000.0
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(PartitionError, match=r"layers\.2\.mlp\.up_proj\.weight .*float16; choose"):
        split(model, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    split(model, tmp_path / "out", dtype=torch.bfloat16)


def test_fingerprints_tell_models_plans_and_bases_apart(tiny_llama: Path, tmp_path: Path) -> None:
    base = split(tiny_llama, tmp_path / "base")["cloud"].fingerprints
    assert split(tiny_llama, tmp_path / "again")["edge"].fingerprints == base
    placed = split(tiny_llama, tmp_path / "placed", edge_first=1)["cloud"].fingerprints
    assert (placed.model, placed.basis) == (base.model, base.basis)
    assert placed.plan != base.plan
    seeded = split(tiny_llama, tmp_path / "seeded", seed=1)["cloud"].fingerprints
    assert (seeded.model, seeded.plan) == (base.model, base.plan)
    assert seeded.basis != base.basis

    other = save_tiny("llama", tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, other / "model.safetensors")
    changed = split(other, tmp_path / "changed")["cloud"].fingerprints
    assert changed.model != base.model
    assert (changed.plan, changed.basis) == (base.plan, base.basis)

    config = other / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    shutil.copy(tiny_llama / "model.safetensors", other)
    assert split(other, tmp_path / "norm")["cloud"].fingerprints.model != base.model

    with pytest.raises(PartitionError, match=r"do not belong together: model differ.* one run"):
        check_pair(base, changed)
    assert check_pair(base, base) is None  # type: ignore[func-returns-value]


def test_a_model_fingerprint_is_of_the_numbers_not_of_the_files(tmp_path: Path) -> None:
    whole = save_tiny("llama", tmp_path / "whole")
    parts = save_tiny("llama", tmp_path / "parts", sharded=True)
    pickled = save_tiny("llama", tmp_path / "pickled", safe=False)
    found = {
        split(model, model / "out")["cloud"].model_fingerprint for model in (whole, parts, pickled)
    }
    assert len(found) == 1


def test_shapes_add_up_to_the_whole_for_every_placement(tiny_llama: Path) -> None:
    with open_checkpoint(str(tiny_llama)) as checkpoint:
        for edge_first in range(4):
            for edge_last in range(4 - edge_first):
                plan = make_plan(
                    checkpoint.config,
                    rank_up=8,
                    rank_down=8,
                    edge_first=edge_first,
                    edge_last=edge_last,
                )
                cloud = shard_shapes(checkpoint.config, plan, "cloud")
                edge = shard_shapes(checkpoint.config, plan, "edge")
                assert len(cloud.keys() | edge.keys()) == 3 + 4 * 9 + 4 + 4 * 3
                assert cloud.keys() & edge.keys() == {
                    f"model.layers.{edge_first}.input_layernorm.weight"
                }


def test_shards_may_be_read_by_others(tiny_llama: Path, tmp_path: Path) -> None:
    """Nothing in a shard is private, and the daemon often runs as another user."""
    split(tiny_llama, tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "out").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == wanted & 0o444, path
