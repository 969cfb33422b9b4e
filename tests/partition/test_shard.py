"""Opening shards: a good one loads, and each way of being bad is told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from privatelora.errors import PartitionError
from privatelora.partition.manifest import Fingerprints, check_pair, read_manifest
from privatelora.partition.shard import open_shard
from tests.partition.shards import split


@pytest.fixture(scope="module")
def shards(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with layers on both sides; nobody writes to them."""
    out = tmp_path_factory.mktemp("shards") / "out"
    split(tiny_llama, out, edge_first=1, every=2)
    return out


@pytest.fixture
def edge(shards: Path, tmp_path: Path) -> Path:
    """An edge shard of its own for a test to damage."""
    return Path(shutil.copytree(shards / "edge", tmp_path / "edge"))


@pytest.mark.parametrize("role", ["cloud", "edge"])
def test_a_shard_loads_every_tensor(shards: Path, role: Any) -> None:
    shard = open_shard(shards / role, role)
    stored = load_file(shards / role / "model.safetensors")
    tensors = shard.load()
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    half = shard.load(dtype=torch.bfloat16)
    assert all(torch.equal(half[name], stored[name].to(torch.bfloat16)) for name in stored)


def test_what_was_loaded_does_not_need_the_file_any_more(edge: Path) -> None:
    tensors = open_shard(edge, "edge").load()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    path = edge / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, copies[name])
        tensor.zero_()  # and may be written to


def test_the_edge_brings_its_tokenizer(shards: Path) -> None:
    shard = open_shard(shards / "edge", "edge")
    assert {f"tokenizer/{path.name}" for path in shard.tokenizer_dir.iterdir()} == set(
        shard.manifest.files
    )


def test_the_manifest_says_what_was_split(shards: Path) -> None:
    cloud = open_shard(shards / "cloud", "cloud").manifest
    edge = open_shard(shards / "edge", "edge").manifest
    assert check_pair(cloud.fingerprints, edge.fingerprints) is None  # type: ignore[func-returns-value]
    assert cloud.plan.edge_first == 1
    assert cloud.config.num_layers == 4
    assert cloud.basis.kind == "random"
    assert not cloud.files


def test_a_pair_from_two_runs_is_refused_with_the_reason() -> None:
    ours = Fingerprints("m", "p", "b")
    with pytest.raises(PartitionError, match="plan and basis differ"):
        check_pair(ours, Fingerprints("m", "q", "c"))


def test_the_other_sides_shard_is_refused(shards: Path) -> None:
    with pytest.raises(PartitionError, match="is the cloud shard; the edge needs the edge shard"):
        open_shard(shards / "cloud", "edge")


def test_a_directory_that_is_no_shard_is_refused_with_a_hint(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match=r"did you mean .*out/cloud or .*out/edge\?"):
        open_shard(shards, "edge")
    with pytest.raises(PartitionError, match="make one with privatelora partition"):
        open_shard(tmp_path, "edge")
    with pytest.raises(PartitionError, match="is not a shard"):
        open_shard(tmp_path / "nowhere", "cloud")


def change_manifest(shard: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = shard / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format_version=2), "has format version 2, this program reads 1"),
        (lambda m: m.update(format="other"), "not the manifest of a PrivateLoRA shard"),
        (lambda m: m.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda m: m.pop("plan"), "plan: Field required"),
        (lambda m: m.update(model_fingerprint="abc"), "model_fingerprint: "),
        (lambda m: m["plan"].update(every=1), "plan_fingerprint is not the fingerprint"),
        (lambda m: m["config"].update(num_layers=10**9), "more than 1024 layers"),
        (lambda m: m["config"].update(num_layers=5), "different numbers of layers"),
        (lambda m: m["config"].update(hidden_size=10**9), "do not fit its model and plan"),
        (lambda m: m["config"].update(hidden_size=10**12), "config.hidden_size: Input should be"),
        (lambda m: m["tensors"].pop(NORM), r"do not fit .*\(model\.norm\.weight\)"),
        (lambda m: m["tensors"].update(extra=m["tensors"][NORM]), r"do not fit .*\(extra\)"),
        (lambda m: m["tensors"][NORM].update(shape=[65]), "do not fit its model and plan"),
        (lambda m: m["tensors"][NORM].update(dtype="float16"), "is F32, the manifest says float16"),
        (lambda m: m["tensors"][NORM].update(dtype="int64"), "tensors"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(
    edge: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    change_manifest(edge, change)
    with pytest.raises(PartitionError, match=reason) as error:
        open_shard(edge, "edge")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "tokenizer/../../secret",
        "tokenizer/..",
        "tokenizer/",
        "tokenizer",
        "/etc/passwd",
        "tokenizer//etc/passwd",
        "tokenizer/a/b",
        "tokenizer/a\\b",
        "tokenizer/C:x",
        "other/tokenizer.json",
        "",
    ],
)
def test_a_manifest_cannot_name_files_elsewhere(edge: Path, path: str) -> None:
    change_manifest(edge, lambda m: m["files"].update({path: "0" * 64}))
    with pytest.raises(PartitionError, match="is not a plain file in tokenizer/"):
        open_shard(edge, "edge")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"text"', "{}", "\x00"])
def test_a_manifest_that_is_not_one_is_refused(edge: Path, text: str) -> None:
    (edge / "manifest.json").write_text(text)
    with pytest.raises(PartitionError, match=r"manifest\.json"):
        open_shard(edge, "edge")


def test_an_endless_manifest_is_not_read_to_its_end(edge: Path) -> None:
    with (edge / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: takes no room, and would not fit in memory
    with pytest.raises(PartitionError, match="larger than"):
        read_manifest(edge)


def test_a_tokenizer_file_that_changed_is_refused(edge: Path) -> None:
    with (edge / "tokenizer" / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(PartitionError, match=r"tokenizer\.json is damaged or was changed"):
        open_shard(edge, "edge")


def test_a_tokenizer_file_that_is_missing_or_a_link_is_refused(edge: Path) -> None:
    file = edge / "tokenizer" / "tokenizer.json"
    file.rename(edge / "elsewhere.json")
    with pytest.raises(PartitionError, match=r"cannot read .*tokenizer\.json: No such file"):
        open_shard(edge, "edge")
    file.symlink_to(edge / "elsewhere.json")
    with pytest.raises(PartitionError, match="is not a plain file"):
        open_shard(edge, "edge")


def test_missing_tensors_are_named(edge: Path) -> None:
    path = edge / "model.safetensors"
    tensors = load_file(path)
    del tensors[NORM]
    save_file(tensors, path)
    with pytest.raises(PartitionError, match=r"tensor model\.norm\.weight is missing"):
        open_shard(edge, "edge")
    path.unlink()
    with pytest.raises(PartitionError, match=r"cannot read .*model\.safetensors: No such file"):
        open_shard(edge, "edge")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_file_cut_short_is_refused(edge: Path, keep: int) -> None:
    path = edge / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(keep if keep >= 0 else path.stat().st_size + keep)
    with pytest.raises(PartitionError, match="is damaged, cut short, or not a safetensors file"):
        open_shard(edge, "edge")


def test_every_tensors_bytes_are_checked(edge: Path) -> None:
    path = edge / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    for name, entry in header.items():
        damaged = bytearray(whole)
        damaged[start + entry["data_offsets"][1] - 1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(PartitionError) as error:
            open_shard(edge, "edge").load()
        assert f"tensor {name} is damaged" in str(error.value)


def test_a_file_swapped_after_opening_is_refused(edge: Path, shards: Path) -> None:
    shard = open_shard(edge, "edge")
    shutil.copy(shards / "cloud" / "model.safetensors", edge / "model.safetensors")
    with pytest.raises(PartitionError, match=r"model\.safetensors: tensor .* is missing"):
        shard.load()


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), file=st.sampled_from(["manifest.json", "model.safetensors"]))
def test_no_damage_leads_to_anything_but_a_refusal(
    data: st.DataObject, file: str, shards: Path, edge: Path
) -> None:
    original = (shards / "edge" / file).read_bytes()
    # In the tensor file the header is what a reader must parse; the data only has to hash.
    end = len(original) if file == "manifest.json" else 4096
    position = data.draw(st.integers(0, end - 1))
    damaged = bytearray(original)
    damaged[position] = data.draw(st.integers(0, 255))
    (edge / file).write_bytes(damaged)
    try:
        tensors = open_shard(edge, "edge").load()
    except PartitionError:
        pass  # the one kind of error that may come of it
    else:
        expected = load_file(shards / "edge" / "model.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    finally:
        (edge / file).write_bytes(original)
