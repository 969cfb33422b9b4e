"""Reading Hugging Face directories: every form they come in, and every way they break."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.models.families import EMBED_TOKENS, LM_HEAD, tensor_names
from tests.partition.tiny import FAMILIES, save_tiny, save_weights, tiny_model

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "tokenizer": False}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model", **SMALL)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(path: Path, message: str) -> None:
    with pytest.raises(PartitionError, match=message) as caught:
        open_checkpoint(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_reads_what_was_saved(tmp_path: Path, family: str, safe: bool, sharded: bool) -> None:
    path = save_tiny(family, tmp_path, safe=safe, sharded=sharded, tokenizer=False)
    state = tiny_model(family).state_dict()
    with open_checkpoint(str(path)) as checkpoint:
        names = list(checkpoint.names())
        assert names == list(tensor_names(checkpoint.config))
        for name in names:
            tensor = checkpoint.read(name)
            assert torch.equal(tensor, state[name])
            assert tensor.is_contiguous()
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert checkpoint.dtype(name) is tensor.dtype
        assert checkpoint.source == str(path)
        assert checkpoint.tokenizer_source.directory == path


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_transformers_own_layout(tmp_path: Path, safe: bool) -> None:
    model = tiny_model("qwen3").bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    if not safe:
        state = dict(model.state_dict())  # holds the tied lm_head.weight, too
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        save_weights(state, tmp_path, safe=False)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert LM_HEAD not in checkpoint.names()
        for name in checkpoint.names():
            assert torch.equal(checkpoint.read(name), model.state_dict()[name])
            assert checkpoint.dtype(name) is torch.bfloat16


def test_generation_config_names_the_end_tokens(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    with open_checkpoint(str(model_dir)) as checkpoint:
        assert checkpoint.config.eos_token_ids == (5, 6)
        assert checkpoint.config.bos_token_id == 1


def test_old_rotary_buffers_are_ignored(model_dir: Path) -> None:
    weights = load_file(model_dir / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, model_dir / "model.safetensors")
    with open_checkpoint(str(model_dir)) as checkpoint:
        assert not any("rotary" in name for name in checkpoint.names())


def test_closed_and_unknown(model_dir: Path) -> None:
    checkpoint = open_checkpoint(str(model_dir))
    with pytest.raises(PartitionError, match=r"holds no tensor lm_head\.bias"):
        checkpoint.read("lm_head.bias")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(PartitionError, match="is closed"):
        checkpoint.read(EMBED_TOKENS)


def test_no_file_stays_open(model_dir: Path) -> None:
    def still_open() -> bool:
        links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        files = [str(link.readlink()) for link in links if link.is_symlink()]
        return str(model_dir) in Path("/proc/self/maps").read_text() + " ".join(files)

    with open_checkpoint(str(model_dir)) as checkpoint:
        checkpoint.read(EMBED_TOKENS)
        assert still_open()
    assert not still_open()
    edit_json(model_dir / "config.json", hidden_size=32)
    with pytest.raises(PartitionError, match="shape") as caught:
        open_checkpoint(str(model_dir))
    assert caught.tb is not None  # keeps the half-opened checkpoint alive
    assert not still_open()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(EMBED_TOKENS), rf"lacks {EMBED_TOKENS}:"),
        (lambda w: [w.pop(name) for name in list(w)[:6]], r"lacks .*, .*, .* and 3 more tensors"),
        (lambda w: w.update(extra=torch.ones(1)), "holds extra, which a llama decoder"),
        (
            lambda w: w.update({LM_HEAD: torch.ones(199, 63)}),
            r"lm_head.weight has shape \[199, 63\], .* \[199, 64\]",
        ),
        (lambda w: w.update({LM_HEAD: w[LM_HEAD].to(torch.int8)}), "stored as .*8; only float32"),
        (lambda w: w.update({LM_HEAD: w[LM_HEAD].double()}), "stored as .*64; only float32"),
    ],
    ids=["missing", "many missing", "unknown", "shape", "int8", "float64"],
)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_wrong_tensors(
    tmp_path: Path, safe: bool, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    save_tiny("llama", tmp_path, safe=safe, **SMALL)
    weights = dict(tiny_model("llama", num_hidden_layers=1).state_dict())
    change(weights)
    save_weights(weights, tmp_path, safe=safe)
    refused(tmp_path, message)


def test_tied_head_that_differs(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, **SMALL)
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    refused(tmp_path, "ties lm_head.weight to the embedding")


def test_untied_without_a_head(tmp_path: Path) -> None:
    save_tiny("llama-tied", tmp_path, **SMALL)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    refused(tmp_path, r"lacks lm_head\.weight")


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_truncated_weights(tmp_path: Path, safe: bool, keep: int) -> None:
    save_tiny("llama", tmp_path, safe=safe, **SMALL)
    file = tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, rf"{file.name} is (truncated|damaged)")


def test_a_header_longer_than_its_file(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    refused(model_dir, "damaged")


class Payload:
    """Leaves a mark if anything ever unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_pickle_code_never_runs(tmp_path: Path, form: str) -> None:
    model_dir = save_tiny("llama", tmp_path / "model", safe=False, **SMALL)
    mark = tmp_path / "executed"
    torch.save(
        {"weight": torch.ones(2), "payload": Payload(mark)},
        model_dir / "pytorch_model.bin",
        _use_new_zipfile_serialization=form == "zip",
    )
    refused(model_dir, "run code when loaded .*not executed|nothing in it was executed")
    assert not mark.exists()


def test_bin_that_is_larger_than_its_bytes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, safe=False, **SMALL)
    weights = dict(tiny_model("llama", num_hidden_layers=1).state_dict())
    weights[LM_HEAD] = torch.ones(1, 1).expand(199, 64)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "not a plain table")


def test_bin_that_holds_something_else(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, safe=False, **SMALL)
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    refused(tmp_path, "not a plain table")


@pytest.fixture
def sharded_dir(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model", sharded=True, **SMALL)


def test_missing_shard(sharded_dir: Path) -> None:
    (sharded_dir / "model-00002-of-00003.safetensors").unlink()
    refused(sharded_dir, r"names model-00002-of-00003\.safetensors, which is missing")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ".", "", "a/b", 7])
def test_index_cannot_lead_out(sharded_dir: Path, name: object) -> None:
    save_tiny("llama", sharded_dir.parent, **SMALL)  # ../model.safetensors does exist
    index = sharded_dir / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {LM_HEAD: name})
    refused(sharded_dir, "plain file names")


def test_index_names_the_wrong_shard(sharded_dir: Path) -> None:
    index = sharded_dir / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[LM_HEAD])
    edit_json(index, weight_map=weight_map | {LM_HEAD: other})
    refused(sharded_dir, rf"looks for {LM_HEAD} in {other}")


@pytest.mark.parametrize("text", ['{"weight_map": ', "[]", '{"weight_map": 3}', "{}", "\x80"])
def test_damaged_index(sharded_dir: Path, text: str) -> None:
    (sharded_dir / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    refused(sharded_dir, r"index\.json (is not valid JSON|must hold|has no weight_map)")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "9" * 10_000, '{"model_type": 1}'])
def test_damaged_config(model_dir: Path, text: str) -> None:
    (model_dir / "config.json").write_text(text)
    refused(model_dir, r"config\.json(:| is not valid JSON| must hold)")


def test_config_of_another_depth(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", num_hidden_layers=2)
    refused(model_dir, r"lacks model\.layers\.1\.input_layernorm\.weight")


def test_missing_files(tmp_path: Path) -> None:
    refused(tmp_path, r"config\.json does not exist")
    save_tiny("llama", tmp_path, **SMALL)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "holds no weights")
