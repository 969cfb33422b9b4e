"""Tiny random models of every supported family, and a small real tokenizer, made offline.

Other suites import this: ``save_tiny`` gives a Hugging Face directory to partition,
``tiny_model`` the transformers model to compare with. The same arguments always give the
same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class TinyFamily(NamedTuple):
    """The transformers classes of a family, and how its tiny model differs from ``COMMON``."""

    config: type
    model: type
    differences: Mapping[str, Any] = MappingProxyType({})


COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES = {
    "llama": TinyFamily(LlamaConfig, LlamaForCausalLM),
    "llama-tied": TinyFamily(LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama3-rope": TinyFamily(
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": TinyFamily(MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "qwen2": TinyFamily(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": TinyFamily(
        Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}
    ),
}
"""llama, mistral and qwen2 have an LM head of their own; llama-tied and qwen3 share it."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

SPECIAL_TOKENS = ("<|pad|>", "<|start|>", "<|end|>")
"""Ids 0 to 2: padding, beginning and end."""

_SENTENCES = (
    "The weather in the mountains turns colder when the wind comes from the north.",
    "user system assistant: how many letters are there in the other message?",
    "She sells twenty-three apples, and he answers that this is more than enough.",
)


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Random transformers model of ``family`` in float32, in evaluation mode.

    ``overrides`` are fields of its transformers configuration. Weights are wide enough that
    the largest logit stands clear of the second.
    """
    kind = FAMILIES[family]
    config = kind.config(**{**COMMON, **kind.differences, **overrides})
    with torch.random.fork_rng(devices=[]):
        model = kind.model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def save_tiny(
    family: str,
    path: Path,
    *,
    sharded: bool = False,
    safe: bool = True,
    tokenizer: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write ``tiny_model`` as a Hugging Face directory and return ``path``.

    ``sharded``: three weight files and an index. ``safe``: safetensors, else torch ``.bin``.
    """
    model = tiny_model(family, seed=seed, **overrides)
    path.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    save_weights(tensors, path, sharded=sharded, safe=safe)
    if tokenizer:
        tiny_tokenizer(model.config.vocab_size).save_pretrained(path)
    return path


def save_weights(
    tensors: Mapping[str, torch.Tensor], path: Path, *, sharded: bool = False, safe: bool = True
) -> None:
    """Write tensors under the file names that Hugging Face gives them."""
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")

    def write(part: dict[str, torch.Tensor], file: Path) -> None:
        if safe:
            save_file(part, file, metadata={"format": "pt"})
        else:
            torch.save(part, file)

    if not sharded:
        write(dict(tensors), path / f"{stem}.{suffix}")
        return
    names = list(tensors)
    weight_map = {}
    for number in range(3):
        file_name = f"{stem}-{number + 1:05}-of-00003.{suffix}"
        part = {name: tensors[name] for name in names[number::3]}
        write(part, path / file_name)
        weight_map.update(dict.fromkeys(part, file_name))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _spelling(byte: int) -> str:
    """The character that stands for a byte in a byte-level vocabulary."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in visible else chr(256 + sum(b not in visible for b in range(byte)))


@cache
def _backend(vocab_size: int) -> Tokenizer:
    """Byte-level BPE with exactly ``vocab_size`` tokens, special ones first.

    A vocabulary of 199 has no room for all 256 bytes: it takes ASCII and enough of UTF-8 for
    accented letters, most CJK text and emoji; other characters are lost when encoded.
    """
    alphabet = [10, *range(32, 127), *range(0x80, 0xC0), 0xC3, *range(0xE2, 0xEA), 0xF0]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=[_spelling(byte) for byte in alphabet],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def tiny_tokenizer(vocab_size: int = 199) -> Any:
    """A real fast tokenizer with a chat template; 176 to 240 tokens."""
    fast: Any = PreTrainedTokenizerFast  # its constructor carries no annotations
    return fast(
        tokenizer_object=_backend(vocab_size),
        pad_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        chat_template=CHAT_TEMPLATE,
    )
