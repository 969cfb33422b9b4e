"""``privatelora partition`` as a person or a program runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.split import natural_dtype
from tests.partition.shards import Command
from tests.partition.test_checkpoint_gguf import write_gguf
from tests.partition.tiny import save_tiny


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


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [
        ("Q8_0", torch.float16),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F32", torch.float32),
    ],
)
def test_the_natural_dtype_of_gguf_files(tmp_path: Path, encoding: str, dtype: torch.dtype) -> None:
    path = write_gguf(tmp_path / "m.gguf", encoding=GGMLQuantizationType[encoding])
    with open_checkpoint(str(path)) as checkpoint:
        assert natural_dtype(checkpoint) == dtype


def test_an_interrupt_ends_a_command_with_130(
    command: Command, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("privatelora.partition.split.export_tokenizer", interrupted)
    small = ("--rank-up", 8, "--rank-down", 8, "--basis", "random")
    assert command("partition", tiny_llama, tmp_path / "out", *small).code == 130
    assert not (tmp_path / "out").exists()
