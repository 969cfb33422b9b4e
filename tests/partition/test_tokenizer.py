"""The exported tokenizer gives the same tokens as the one it came from."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.tokenizer import export_tokenizer, load_tokenizer
from tests.partition.test_checkpoint_gguf import write_gguf
from tests.partition.tiny import CHAT_TEMPLATE, FAMILIES, save_tiny

TEXTS = ("Hello there, how are you?", "  two  spaces\n\nand lines\n", "né 😀 12345", "a<|end|>\nb")
CHAT = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine 😀"},
    {"role": "user", "content": "And now?"},
]


def export(model: Path, out_dir: Path) -> None:
    with open_checkpoint(str(model)) as checkpoint:
        export_tokenizer(checkpoint, out_dir)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_directory(tmp_path: Path, family: str) -> None:
    model = save_tiny(family, tmp_path / "model")
    export(model, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(model)
    ours = load_tokenizer(tmp_path / "out")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    chat = ours.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert chat == theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = ours.encode(chat, add_special_tokens=False)
    assert ours.decode(ids) == chat
    assert ids.count(ours.bos_token_id) == 4
    assert ids.count(ours.eos_token_id) == 3
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    assert "local_files_only" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_a_beginning_token_is_still_added(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", tokenizer=False)
    pieces = ["<unk>", "<s>", "</s>", "▁", "h", "i", "▁h", "▁hi"]
    LlamaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[("▁", "h"), ("▁h", "i")],
        add_bos_token=True,
    ).save_pretrained(model)
    export(model, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(model).encode("hi") == [1, 7]
    ours = load_tokenizer(tmp_path / "out")
    assert ours.encode("hi") == [1, 7]
    assert ours.encode("hi", add_special_tokens=False) == [7]
    assert ours.decode([1, 7], skip_special_tokens=True) == "hi"


def write_gpt2_gguf(path: Path, split: str | None, *, eos: int = 2) -> Path:
    """A GGUF file with a byte-level vocabulary that merges digits and spaces where it may."""
    alphabet = ["Ġ", "Ċ", *"0123456789abcdefghijklmnopqrstuvwxyz<|>_", "é"]
    specials = ["<|pad|>", "<|start|>", "<|end|>"]
    merges = ["Ġ 1", "1 2", "Ġ Ġ"]
    tokens = specials + alphabet + [merge.replace(" ", "") for merge in merges]
    padding = [f"<unused{i}>" for i in range(199 - len(tokens))]

    def edit(writer: Any) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.tokens")
        writer.kv_data[0].pop("tokenizer.ggml.token_type")
        writer.kv_data[0].pop("tokenizer.ggml.eos_token_id")
        writer.add_tokenizer_model("gpt2")
        if split is not None:
            writer.add_tokenizer_pre(split)
        writer.add_token_list(tokens + padding)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3) + [5] * len(padding))
        writer.add_token_merges(merges)
        writer.add_eos_token_id(eos)
        writer.add_chat_template(CHAT_TEMPLATE)

    return write_gguf(path, edit=edit)


def spelled(tokenizer: Any, text: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer.encode(text)))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("gpt-2", ["a", "Ġ", "Ġ1", "2"]),
        (None, ["a", "Ġ", "Ġ1", "2"]),
        ("smollm", ["a", "ĠĠ", "1", "2"]),
        ("llama-bpe", ["a", "Ġ", "Ġ", "12"]),
        ("qwen2", ["a", "Ġ", "Ġ", "1", "2"]),
    ],
)
def test_gguf_vocabularies_cut_as_they_say(
    tmp_path: Path, split: str | None, expected: list[str]
) -> None:
    export(write_gpt2_gguf(tmp_path / "m.gguf", split), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert spelled(tokenizer, "a<|end|>") == ["a", "<|end|>"]
    assert spelled(tokenizer, "a  12") == expected


def test_refused_gguf_tokenizers(tmp_path: Path) -> None:
    path = write_gpt2_gguf(tmp_path / "m.gguf", "starcoder")
    with pytest.raises(PartitionError, match="pre-tokenizer starcoder is not supported"):
        export(path, tmp_path / "out")
    write_gpt2_gguf(path, "gpt-2", eos=10**6)
    with pytest.raises(PartitionError, match="cannot build its tokenizer"):
        export(path, tmp_path / "out")
    write_gguf(path)
    with pytest.raises(PartitionError, match="holds no tokenizer"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_tokenizer(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", tokenizer=False)
    with pytest.raises(PartitionError, match="holds no tokenizer"):
        export(model, tmp_path / "out")
    with pytest.raises(PartitionError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": "1.0", "model": {"type": "x"}}'])
def test_damaged_tokenizer(tmp_path: Path, text: str) -> None:
    model = save_tiny("llama", tmp_path / "model")
    export(model, tmp_path / "out")
    for directory in (model, tmp_path / "out"):
        (directory / "tokenizer.json").write_text(text)
    with pytest.raises(PartitionError, match="cannot load its tokenizer"):
        export(model, tmp_path / "again")
    with pytest.raises(PartitionError, match="the tokenizer is damaged"):
        load_tokenizer(tmp_path / "out")


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", tokenizer=False, vocab_size=176)
    save_tiny("llama", tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(PartitionError, match="199 tokens, the model 176"):
        export(model, tmp_path / "out")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    mark = tmp_path / "executed"
    (model / "custom.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass T: pass\n")
    config = model / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields |= {"auto_map": {"AutoTokenizer": ["custom.T", "custom.T"]}, "tokenizer_class": "T"}
    config.write_text(json.dumps(fields))
    with pytest.raises(PartitionError, match="cannot load its tokenizer"):
        export(model, tmp_path / "out")
    assert not mark.exists()
