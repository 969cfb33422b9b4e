"""Importing adapters of the published system, whatever state their file is in."""

from __future__ import annotations

import os
import pickle
import shlex
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from privatelora.errors import PartitionError
from privatelora.partition.adapter import load_adapter
from privatelora.partition.plan import TARGETS
from privatelora.partition.published import read_published
from privatelora.partition.shard import open_shard
from tests.partition.shards import Command, split

State = dict[str, Any]
PREFIX = "model.layers.{}.self_attn.{}_lora."
OUT_FEATURES = {"q": 64, "k": 32, "v": 32}


def published(layers: tuple[int, ...] = (0, 1, 2, 3), prefix: str = "", rank: int = 6) -> State:
    """A state dict as the published trainer saves it, for the tiny models."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    for layer in layers:
        for target, out_features in OUT_FEATURES.items():
            name = prefix + PREFIX.format(layer, target)
            state[name + "lora_A.weight"] = torch.randn(rank, 64, generator=generator)
            state[name + "lora_mobile.weight"] = torch.randn(rank, rank, generator=generator)
            state[name + "lora_B.weight"] = torch.randn(out_features, rank, generator=generator)
    return state


def saved(path: Path, state: object, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def test_import_split_and_load_work_together(
    command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    """What the shards compute with the imported adapter is what the published layers compute."""
    state = published((1, 3))
    path, out = saved(tmp_path / "gsm8k.bin", state), tmp_path / "im ported"
    imported = command(
        "adapter", "import", path, out, "--num-layers", 4, "--scaling", 0.5, "--json"
    )
    assert imported.code == 0, imported.err
    assert imported.json["parameters"] == 2 * 3 * 36

    program, *arguments = shlex.split(imported.json["next_command"])
    assert program == "privatelora"
    places = {"MODEL": tiny_llama, "SHARDS": tmp_path / "shards"}
    result = command(*(places.get(argument, argument) for argument in arguments), "--json")
    assert result.code == 0, result.err
    assert result.json["basis"] == {"kind": "file"}

    shards = {role: open_shard(tmp_path / "shards" / role, role) for role in ("cloud", "edge")}
    manifest = shards["edge"].manifest
    adapter = load_adapter(
        out / "adapter.safetensors",
        manifest.plan,
        manifest.basis_fingerprint,
        manifest.model_fingerprint,
    )
    tensors = shards["cloud"].load() | shards["edge"].load()
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for index, layer in enumerate((1, 3)):
        z = hidden @ tensors[f"points.{index}.lora_A.weight"].T
        for block, target in enumerate(TARGETS):
            y = z[:, 6 * block : 6 * block + 6] @ adapter.weights[layer, target].T
            b = tensors[f"model.layers.{layer}.self_attn.{target}_proj.lora_B.weight"]
            name = PREFIX.format(layer, target)
            expected = hidden @ state[name + "lora_A.weight"].T
            expected = expected @ state[name + "lora_mobile.weight"].T
            expected = 0.5 * expected @ state[name + "lora_B.weight"].T
            torch.testing.assert_close(manifest.plan.scaling * y @ b.T, expected)


def test_an_imported_adapter_is_private_and_bound_to_its_basis(
    command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    path, out = saved(tmp_path / "a.bin", published()), tmp_path / "out"
    shown = command("adapter", "import", path, out)
    assert shown.code == 0, shown.err
    assert "privatelora partition MODEL SHARDS --plan" in shown.out
    assert stat.S_IMODE((out / "adapter.safetensors").stat().st_mode) == 0o600
    manifest = split(tiny_llama, tmp_path / "shards", rank=6)["edge"]
    with pytest.raises(PartitionError, match="made for basis"):
        load_adapter(
            out / "adapter.safetensors",
            manifest.plan,
            manifest.basis_fingerprint,
            manifest.model_fingerprint,
        )


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.", "base_model.model."])
@pytest.mark.parametrize("zipped", [True, False])
def test_prefixes_and_older_files_are_read(tmp_path: Path, prefix: str, zipped: bool) -> None:
    state = published((0, 2), prefix)
    state[f"{prefix}model.layers.0.mlp.up_proj.weight"] = torch.ones(2)
    path = saved(tmp_path / "a.bin", state, _use_new_zipfile_serialization=zipped)
    found = read_published(path)
    assert found.plan.layers == (0, 2)
    assert found.plan.num_layers == 3
    name = prefix + PREFIX.format(2, "k")
    assert torch.equal(found.adapter.weights[2, "k"], state[name + "lora_mobile.weight"])


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in published((0,)).items()}
    found = read_published(saved(tmp_path / "a.bin", state))
    tensors = [*found.basis.values(), *found.adapter.weights.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_what_was_read_does_not_need_the_file_any_more(tmp_path: Path) -> None:
    state = published((0,))
    path = saved(tmp_path / "a.bin", state)
    found = read_published(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    name = PREFIX.format(0, "q") + "lora_mobile.weight"
    assert torch.equal(found.adapter.weights[0, "q"], state[name])


def without(name: str) -> State:
    return {key: value for key, value in published().items() if key != name}


Q1 = PREFIX.format(1, "q")
V3 = PREFIX.format(3, "v")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds no published PrivateLoRA adapter"),
        ({"model.norm.weight": torch.ones(3)}, "holds no published PrivateLoRA adapter"),
        (without(Q1 + "lora_mobile.weight"), "layer 1 has no lora_mobile for q"),
        (without(V3 + "lora_A.weight"), "layer 3 has no lora_A for v"),
        (
            {name: value for name, value in published().items() if V3 not in name},
            "layer 3 and layer 0 adapt different projections",
        ),
        (
            published() | {Q1 + "lora_A.weight": torch.ones(7, 64)},
            r"lora_A of layer 1 q has shape \(7, 64\), expected \(6, 64\)",
        ),
        (
            published((0,), rank=6) | {k: v for k, v in published(rank=4).items() if ".1." in k},
            "all ranks and sizes must agree",
        ),
        (published() | {V3 + "lora_B.weight": torch.ones(64, 6)}, "lora_B of layer 3 v has shape"),
        (published() | {Q1 + "lora_B.weight": torch.ones(6)}, "lora_B.weight is not a matrix"),
        (published() | {Q1 + "lora_B.weight": "text"}, "lora_B.weight is not a matrix"),
        (
            published() | {Q1 + "lora_mobile.weight": torch.ones(6, 6, dtype=torch.int64)},
            "lora_mobile.weight is not a matrix of numbers",
        ),
        (
            published() | {Q1 + "lora_mobile.weight": torch.full((6, 6), torch.inf)},
            "lora_mobile.weight holds infinite values",
        ),
        (published() | published((1,), "module."), "twice, under different prefixes"),
        (
            published() | {"model.layers.1.self_attn.o_lora.lora_A.weight": torch.ones(6, 64)},
            "o_lora.lora_A.weight, which is not part of the published layout",
        ),
        (published((9999,)), "names a layer beyond 1023"),
        (published((0,), rank=0), "rank_up: Input should be greater than 0"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, state: object, reason: str) -> None:
    with pytest.raises(PartitionError, match=reason) as error:
        read_published(saved(tmp_path / "a.bin", state))
    assert "a.bin" in str(error.value)
    assert "\n" not in str(error.value)


class Harmful:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "trap"
    state = published() | {"model.extra": Harmful(trap)}
    path = saved(tmp_path / "a.bin", state, _use_new_zipfile_serialization=zipped)
    with pytest.raises(PartitionError, match="nothing in it was executed"):
        read_published(path)
    assert not trap.exists()
    path.write_bytes(pickle.dumps(Harmful(trap)))
    with pytest.raises(PartitionError, match="nothing in it was executed"):
        read_published(path)
    assert not trap.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, -1, -100])
def test_a_damaged_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path / "a.bin", published())
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(PartitionError, match="is damaged"):
        read_published(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match=r"nowhere\.bin does not exist"):
        read_published(tmp_path / "nowhere.bin")


def test_a_model_too_small_for_the_adapter_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", published())
    with pytest.raises(
        PartitionError, match="adapts layer 3, a model of 2 layers ends with layer 1"
    ):
        read_published(path, num_layers=2)


def test_import_does_not_overwrite(command: Command, tmp_path: Path) -> None:
    path, out = saved(tmp_path / "a.bin", published()), tmp_path / "out"
    assert command("adapter", "import", path, out).code == 0
    before = load_file(out / "adapter.safetensors")
    again = command("adapter", "import", path, out, "--scaling", 2)
    assert again.code == 1
    assert "exists; choose another directory" in again.err
    after = load_file(out / "adapter.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
