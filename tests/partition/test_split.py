"""Writing shards: what goes where, what survives failure, and the command."""

from __future__ import annotations

import math
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from privatelora.errors import ConfigError, PartitionError
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.layout import shard_shapes
from privatelora.partition.manifest import check_pair
from privatelora.partition.plan_file import make_plan
from privatelora.partition.split import make_basis
from tests.partition.shards import Command, split
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


def test_an_existing_shard_is_kept_unless_forced(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(tiny_llama, out)
    before = (out / "cloud" / "model.safetensors").read_bytes()
    with pytest.raises(PartitionError, match=r"cloud exists; .*--force"):
        split(tiny_llama, out, seed=1)
    assert (out / "cloud" / "model.safetensors").read_bytes() == before
    manifests = split(tiny_llama, out, seed=1, replace=True)
    assert (out / "cloud" / "model.safetensors").read_bytes() != before
    assert manifests["edge"].basis.seed == 1
    assert sorted(os.listdir(out)) == ["cloud", "edge"]


def test_replacing_never_deletes_what_is_not_a_shard(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(tiny_llama, out)
    (out / "edge" / "adapter.safetensors").write_bytes(b"private")
    with pytest.raises(PartitionError, match=r"holds 'adapter\.safetensors'.*move that away"):
        split(tiny_llama, out, replace=True)
    assert (out / "edge" / "adapter.safetensors").read_bytes() == b"private"


class StopError(Exception):
    """Raised where a test wants the work to end."""


@pytest.mark.parametrize("phase", ["model", "basis"])
@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, phase: str, error: type[BaseException]
) -> None:
    def stop(current: str, done: int, total: int) -> None:
        if current == phase and done > total // 2:
            raise error

    with pytest.raises(error):
        split(tiny_llama, tmp_path / "a" / "out", progress=stop)
    assert not (tmp_path / "a" / "out").exists()


def test_a_failed_replacement_keeps_the_old_shards(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(tiny_llama, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def stop(current: str, done: int, total: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        split(tiny_llama, out, seed=1, replace=True, progress=stop)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_directory_that_appears_meanwhile_is_not_overwritten(
    tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def appear(current: str, done: int, total: int) -> None:
        (out / "edge").mkdir(exist_ok=True)
        (out / "edge" / "notes").write_text("mine")

    with pytest.raises(PartitionError, match=r"cannot write .*not empty"):
        split(tiny_llama, out, progress=appear)
    assert os.listdir(out) == ["edge"]
    assert (out / "edge" / "notes").read_text() == "mine"


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.partition.shards import split

def die(phase, done, total):
    if phase == "basis":
        os.kill(os.getpid(), signal.SIGKILL)

split(Path(sys.argv[1]), Path(sys.argv[2]), progress=die)
"""


def test_what_a_killed_run_leaves_is_no_shard_and_is_cleaned_up(
    tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", KILLED, tiny_llama, out], capture_output=True, check=False
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    left = os.listdir(out)
    assert len(left) == 1
    assert left[0].startswith(".partial-")
    split(tiny_llama, out)
    assert sorted(os.listdir(out)) == ["cloud", "edge"]


def test_two_runs_do_not_write_into_one_directory(tiny_llama: Path, tmp_path: Path) -> None:
    tried = []

    def meanwhile(phase: str, done: int, total: int) -> None:
        if not tried:
            tried.append(phase)
            with pytest.raises(PartitionError, match="being written by another process"):
                split(tiny_llama, tmp_path / "out")

    split(tiny_llama, tmp_path / "out", progress=meanwhile)
    assert tried
    assert sorted(os.listdir(tmp_path / "out")) == ["cloud", "edge"]


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Make the system refuse to let a file grow further, as a full disk or a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(PartitionError) as error:
        split(tiny_llama, tmp_path / "out")
    assert str(error.value).startswith("cannot write ")
    assert "File too large" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_said_before_writing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = (2**30, 2**30 - 1000, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": usage[2]}))
    with pytest.raises(PartitionError, match=r"the shards need .* GiB left"):
        split(tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(PartitionError, match=r"cannot write .*file"):
            split(tiny_llama, out)


def test_what_is_wrong_with_the_basis_is_said_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(PartitionError, match=r"rank_up 33 .* k projection"):
        split(tiny_llama, tmp_path / "out", basis="svd", rank_up=33)
    with pytest.raises(ConfigError, match="'sdv' is neither svd, random, nor a file"):
        split(tiny_llama, tmp_path / "out", basis="sdv")
    assert not (tmp_path / "out").exists()


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
                assert make_basis("svd", plan, checkpoint).provenance.kind == "svd"


def test_the_command_splits_and_tells_what_it_did(
    command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = (
        tiny_llama, out, "--rank-up", 8, "--rank-down", 4, "--layers", "0-1,3", "--every", "all",
        "--targets", "q,v", "--scaling", 0.5, "--basis", "random", "--seed", 3,
        "--edge-last", 1, "--dtype", "bfloat16",
    )  # fmt: skip
    result = command("partition", *arguments, "--json")
    assert result.code == 0, result.err
    assert result.err == ""
    assert result.json["plan"] == {
        "num_layers": 4,
        "layers": [0, 1, 3],
        "targets": ["q", "v"],
        "rank_up": 8,
        "rank_down": 4,
        "every": 3,
        "scaling": 0.5,
        "edge_first": 0,
        "edge_last": 1,
    }
    assert result.json["basis"] == {"kind": "random", "seed": 3}
    assert result.json["dtype"] == "bfloat16"
    assert result.json["round_trips_per_token"] == 1
    assert result.json["adapter_parameters"] == 3 * 2 * 8 * 4
    stored = load_file(out / "cloud" / "model.safetensors")
    assert result.json["cloud_nbytes"] == sum(t.nbytes for t in stored.values())
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}

    again = command("partition", *arguments)
    assert again.code == 1
    assert again.err.startswith("error: ")
    assert again.err.count("\n") == 1
    shown = command("partition", *arguments, "--force")
    assert shown.code == 0, shown.err
    assert "layers 0 to 2 of 4" in shown.out
    assert f"privatelora adapter init {out}/edge" in shown.out


def test_the_command_reads_a_plan_and_options_override_it(
    command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("rank_up: 8\nrank_down: 8\nevery: 2\n")
    result = command(
        "partition", tiny_llama, tmp_path / "out", "--plan", plan, "--every", 3, "--json"
    )
    assert result.code == 0, result.err
    assert (result.json["plan"]["every"], result.json["plan"]["rank_up"]) == (3, 8)
    assert result.json["dtype"] == "float32"
    assert result.json["basis"] == {"kind": "svd"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "rank_up 128 is larger than the hidden size; choose at most 64"),
        (("--layers", "2-9"), "layers: layer 9 does not exist; the model has layers 0 to 3"),
        (("--every", "some"), "--every 'some': give a number of layers, or all"),
        (("--seed", "1"), "--seed belongs to --basis random"),
    ],
)
def test_the_command_explains_what_does_not_fit(
    command: Command, tiny_llama: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = command("partition", tiny_llama, tmp_path / "out", *options)
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_natural_dtype_is_the_models(
    command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    model = save_tiny("llama", tmp_path / "model")
    half = {
        name: tensor if "norm" in name else tensor.to(torch.bfloat16)
        for name, tensor in tensors.items()
    }
    save_file(half, model / "model.safetensors")
    small = ("--rank-up", 8, "--rank-down", 8)
    result = command("partition", model, tmp_path / "out", *small, "--json")
    assert result.json["dtype"] == "bfloat16"


def test_shards_may_be_read_by_others(tiny_llama: Path, tmp_path: Path) -> None:
    """Nothing in a shard is private, and the daemon often runs as another user."""
    split(tiny_llama, tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "out").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == wanted & 0o444, path
