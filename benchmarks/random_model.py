"""Models of random weights: how fast a model is does not depend on what its weights say.

What comes out is a Hugging Face directory like any other, with a tokenizer of bytes. Matrices are
drawn from N(0, 0.02^2), norms are ones and biases zeros, as in a model before its training.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from privatelora.benchmarks.predict_shapes import SHAPE_NAMES, named_shape
from privatelora.errors import ConfigError, PartitionError
from privatelora.partition.checkpoint.hf import read_json
from privatelora.partition.files import check_space, os_errors
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import FAMILIES, from_hf_config, tensor_names
from privatelora.partition.split import Progress
from privatelora.partition.staging import staged
from privatelora.partition.tensor_file import DTYPE_NAMES, TensorFileWriter

STD = 0.02
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
BOS_ID, EOS_ID = 1, 2


def model_fields(shape: str) -> dict[str, Any]:
    """What config.json says of a model: one known by name, or of that file or its folder.

    Raises ConfigError or PartitionError.
    """
    known = named_shape(shape)
    if known is not None:
        return _fields(known.config)
    path = Path(shape)
    if not path.exists():
        raise ConfigError(
            f"{shape} is no model whose shape is known ({', '.join(SHAPE_NAMES)}), and no "
            "config.json or folder with one"
        )
    return read_json(path / "config.json" if path.is_dir() else path)


def write_random_model(
    fields: dict[str, Any], directory: Path, dtype: torch.dtype, seed: int, progress: Progress
) -> int:
    """Write a model of the shape that ``fields`` of a config.json say; its number of weights.

    One tensor is held at a time. Raises PartitionError for a shape that is not supported, and if
    ``directory`` exists or cannot be written.
    """
    told = {"dtype": DTYPE_NAMES[dtype], "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    fields = fields | told
    config = from_hf_config(fields)
    tokenizer = _byte_tokenizer()
    if config.vocab_size < len(tokenizer):
        raise PartitionError(
            f"a vocabulary of {config.vocab_size} has no room for bytes: {len(tokenizer)} at least"
        )
    shapes = tensor_names(config)
    num_weights = sum(math.prod(shape) for shape in shapes.values())
    generator = torch.Generator().manual_seed(seed)
    with (
        staged(directory.parent, [directory.name], replace=False, content=()) as temporary,
        os_errors(f"write {directory}"),
    ):
        place = temporary / directory.name
        place.mkdir()
        check_space(place, num_weights * dtype.itemsize, "its weights")
        (place / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        tokenizer.save_pretrained(place)
        done = 0
        file = place / "model.safetensors"
        with TensorFileWriter(file, shapes, dtype, {"format": "pt"}) as writer:
            for name, shape in shapes.items():
                tensor = _random(name, shape, dtype, generator)
                writer.write(name, tensor)
                done += tensor.nbytes
                progress("weights", done, num_weights * dtype.itemsize)
    return num_weights


def _random(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if "norm" in name:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0.0, STD, generator=generator)


def _fields(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a plain Llama."""
    return {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    unknown, first, last = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=first, eos_token=last
    )
