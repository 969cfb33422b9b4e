"""GGUF metadata as a Hugging Face configuration, so that one set of checks serves both."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint.gguf_header import GgufArray, GgufHeader, Scalar

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor that holds Llama 3's rope scaling: what each frequency is divided by."""

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""GGUF's names; they agree with Hugging Face's ``model_type``. Mistral is ``llama`` here."""

# Llama 3 fixes these; a file tells only the factors that follow from them.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_POSITIONS = 1.0, 4.0, 8192

_CHANGES_ARITHMETIC = (
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
"""Keys that, with a value other than zero, ask for something the engine does not compute."""

_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


def hf_config(
    header: GgufHeader, rope_factors: npt.NDArray[np.float32] | None
) -> dict[str, object]:
    """Translate the metadata of a supported architecture.

    ``rope_factors``: the content of ``rope_freqs.weight``, (head_dim / 2,), if there is one.
    Raises PartitionError for an architecture, setting or scaling that is not supported, and
    for missing keys.
    """
    keys = _Keys(header)
    keys.refuse_unsupported()
    num_heads, hidden_size = keys.integer("attention.head_count"), keys.integer("embedding_length")
    if num_heads < 1:
        raise PartitionError(f"{keys.arch}.attention.head_count is {num_heads}")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise PartitionError(
                f"{keys.arch}.{key} differs from the head dimension {head_dim}, which is not "
                "supported"
            )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise PartitionError("token_embd.weight is missing: the file is incomplete")
    return {
        "model_type": keys.arch,
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys, head_dim, rope_factors),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(header),
    }


class _Keys:
    """Metadata of the file's architecture, by key without its prefix."""

    def __init__(self, header: GgufHeader) -> None:
        arch = header.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise PartitionError(
                f"unsupported GGUF architecture {arch!r}; supported: {', '.join(ARCHITECTURES)} "
                "(Mistral files say llama)"
            )
        self.arch = arch
        self._metadata = header.metadata

    def get(self, key: str) -> Scalar | GgufArray | None:
        return self._metadata.get(f"{self.arch}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._required(key, default)
        if not isinstance(value, int):
            raise PartitionError(
                f"{self.arch}.{key} is no single whole number; layers that differ are not supported"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._required(key, default)
        if not isinstance(value, int | float):
            raise PartitionError(f"{self.arch}.{key} is not a number")
        return float(value)

    def refuse_unsupported(self) -> None:
        parts = self._metadata.get("split.count")
        if parts is not None and parts not in (0, 1):
            raise PartitionError(
                f"the model is split over {parts} files; join them with llama-gguf-split --merge"
            )
        for key in _CHANGES_ARITHMETIC:
            if self.get(key):
                raise PartitionError(f"{self.arch}.{key} is set, which is not supported")

    def _required(self, key: str, default: float | None) -> Scalar | GgufArray:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise PartitionError(f"metadata {self.arch}.{key} is missing")
        return value


def _rope(keys: _Keys, head_dim: int, factors: npt.NDArray[np.float32] | None) -> dict[str, object]:
    theta = keys.number("rope.freq_base", 10_000.0)
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    # llama.cpp takes a factor without a type as linear.
    kind = keys.get("rope.scaling.type") or "linear"
    scaled = kind != "none" and not (kind == "linear" and factor == 1.0)
    if factors is not None and not np.all(factors == 1.0):
        if scaled:
            raise PartitionError(f"{ROPE_FACTORS} together with rope scaling {kind} is unsupported")
        return {"rope_theta": theta, **_llama3(keys, theta, head_dim, factors)}
    if scaled:
        return {"rope_theta": theta, "rope_type": kind, "factor": factor}
    return {"rope_theta": theta, "rope_type": "default"}


def _llama3(
    keys: _Keys, theta: float, head_dim: int, factors: npt.NDArray[np.float32]
) -> dict[str, object]:
    """Recover Llama 3's scaling from the factors, and prove it by computing them again."""
    original = keys.integer("rope.scaling.original_context_length", _ORIGINAL_POSITIONS)
    factor = float(factors.max()) if factors.size else 0.0
    if factors.shape == (head_dim // 2,) and factor > 1.0 and original > 0 and theta > 0:
        turns = original / (2 * math.pi) * theta ** (-np.arange(0, head_dim, 2) / head_dim)
        kept = (turns - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
        kept = kept.clip(0.0, 1.0)
        if np.allclose(factors, 1 / ((1 - kept) / factor + kept), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW_FREQ_FACTOR,
                "high_freq_factor": _HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": original,
            }
    raise PartitionError(f"{ROPE_FACTORS} is not the rope scaling of Llama 3; it is not supported")


def _end_tokens(header: GgufHeader) -> list[Scalar | GgufArray]:
    """Ids that end an answer: the end of the text, and of a turn where the file names it."""
    ids = (header.metadata.get(f"tokenizer.ggml.{key}") for key in _END_TOKENS)
    return list(dict.fromkeys(value for value in ids if value is not None))
