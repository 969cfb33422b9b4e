"""Models of random weights are models like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from privatelora.benchmarks.predict_shapes import named_shape
from privatelora.benchmarks.random_model import model_fields, write_random_model
from privatelora.errors import ConfigError, PartitionError
from privatelora.partition.models.families import from_hf_config
from privatelora.runtime.unsplit import open_unsplit
from tests.partition.tiny import FAMILIES, save_tiny


def say(_phase: str, _done: int, _total: int) -> None:
    """Nobody listens."""


def random_model(tmp_path: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    other = save_tiny(family, tmp_path / "other", vocab_size=300, tokenizer=False)
    write_random_model(model_fields(str(other)), tmp_path / "random", dtype, 0, say)
    return tmp_path / "random"


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family(family: str, tmp_path: Path) -> None:
    directory = random_model(tmp_path, family)
    ours = open_unsplit(str(directory))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = [5, 299, 1, 77]
    sequence = await ours.model.open_sequence(8)
    try:
        logits = await sequence.forward(ids, 0, "all")
    finally:
        await sequence.aclose()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Ünïcode, 42 and 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert ours.eos_ids == (tokenizer.eos_token_id,)


def test_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    fields = model_fields(
        str(save_tiny("llama", tmp_path / "other", vocab_size=300, tokenizer=False))
    )
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        told: list[tuple[str, int, int]] = []

        def note(*what: Any, told: list[Any] = told) -> None:
            told.append(what)

        count = write_random_model(fields, tmp_path / name, torch.bfloat16, seed, note)
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert sum(tensor.numel() for tensor in tensors.values()) == count
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert told[-1] == ("weights", 2 * count, 2 * count)
        assert told == sorted(told)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("name", ["7b", "llama-2-13b", "30B"])
def test_shapes_that_are_known(name: str) -> None:
    shape = named_shape(name)
    assert shape is not None
    read = from_hf_config(json.loads(json.dumps(model_fields(name))))
    assert read == shape.config


def test_what_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"70b is no model whose shape is known \(llama-2-7b, "):
        model_fields("70b")
    with pytest.raises(PartitionError, match=r"config\.json does not exist"):
        model_fields(str(tmp_path))
    fields = model_fields(str(save_tiny("llama", tmp_path / "other")))
    with pytest.raises(PartitionError, match="a vocabulary of 199 has no room for bytes: 259 at"):
        write_random_model(fields, tmp_path / "random", torch.float32, 0, say)
    with pytest.raises(PartitionError, match="unsupported architecture 'gpt2'"):
        write_random_model({"model_type": "gpt2"}, tmp_path / "random", torch.float32, 0, say)
    large = model_fields("7b") | {"intermediate_size": 10**9}
    with pytest.raises(PartitionError, match=r"its weights need \d+\.\d GiB, the disk of "):
        write_random_model(large, tmp_path / "random", torch.float32, 0, say)
    assert not (tmp_path / "random").exists()
    fits = fields | {"vocab_size": 259}
    write_random_model(fits, tmp_path / "random", torch.float32, 0, say)
    with pytest.raises(PartitionError, match="random exists; choose another directory"):
        write_random_model(fits, tmp_path / "random", torch.float32, 0, say)
