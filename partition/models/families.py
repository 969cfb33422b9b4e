"""Decoder families as data: from a published configuration to DecoderConfig, and tensor names.

A family is an entry of ``FAMILIES``: the Hugging Face ``model_type`` it answers to, the class
that defines its arithmetic, and a function that says how it differs from plain Llama. What
the engine cannot compute exactly is refused here, before a single tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from privatelora.errors import PartitionError
from privatelora.partition.models.config import DecoderConfig, RopeConfig

Fields = Mapping[str, Any]
"""A parsed config.json: anything JSON can hold, so nothing in it is trusted."""

Shape = tuple[int, ...]

EMBED_TOKENS = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

MAX_LAYERS = 1024
"""Far above any published decoder; bounds what a hostile configuration can make us build."""

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)

_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclass(frozen=True)
class Family:
    """One Llama-like family.

    ``architecture``: the class named in a checkpoint's ``architectures``. ``variations``:
    the DecoderConfig fields that differ from plain Llama, given the configuration.
    ``required``: fields it needs besides the common ones.
    """

    architecture: str
    variations: Callable[[Fields], dict[str, object]]
    required: tuple[str, ...] = ()


def _llama(config: Fields) -> dict[str, object]:
    bias = config.get("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": config.get("mlp_bias", False)}


def _mistral(config: Fields) -> dict[str, object]:
    if config.get("layer_types") is not None:
        raise PartitionError("layer_types is not supported for mistral; remove it or use qwen2")
    # Published Mistral configurations without the field mean 4096; null means no window.
    window = config.get("sliding_window", 4096)
    if window is None:
        return {}
    return {
        "sliding_window": window,
        "sliding_layers": tuple(range(_positive_int(config, "num_hidden_layers"))),
    }


def _qwen2(config: Fields) -> dict[str, object]:
    return {"qkv_bias": True, **_qwen_window(config)}


def _qwen3(config: Fields) -> dict[str, object]:
    bias = config.get("attention_bias", False)
    return {"qk_norm": True, "qkv_bias": bias, "output_bias": bias, **_qwen_window(config)}


def _qwen_window(config: Fields) -> dict[str, object]:
    """Layers with a sliding window: listed in ``layer_types``, or from a layer on."""
    num_layers = _positive_int(config, "num_hidden_layers")
    windowed = bool(config.get("use_sliding_window", False))
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = num_layers
        if windowed and config.get("sliding_window") is not None:
            first = _positive_int(config, "max_window_layers", minimum=0)
        layers = tuple(range(min(first, num_layers), num_layers))
    else:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise PartitionError(f"layer_types must list one kind for each of {num_layers} layers")
        for kind in layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise PartitionError(
                    f"layer type {kind!r} is not supported; supported: full_attention, "
                    "sliding_attention"
                )
        layers = tuple(i for i, kind in enumerate(layer_types) if kind == "sliding_attention")
    if not layers:
        return {}
    if not windowed:
        raise PartitionError("layer_types names sliding layers, but use_sliding_window is not set")
    return {"sliding_window": config.get("sliding_window"), "sliding_layers": layers}


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _mistral),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, required=("head_dim",)),
}


def from_hf_config(config: Fields) -> DecoderConfig:
    """Read a Hugging Face ``config.json``, of transformers 5 or older.

    Raises PartitionError for an unsupported architecture, for a variation the engine does
    not compute, and for missing or impossible fields.
    """
    name, family = _family(config)
    missing = [key for key in _REQUIRED + family.required if config.get(key) is None]
    if missing:
        raise PartitionError(f"the model configuration lacks {', '.join(missing)}")
    _refuse_unsupported(config)
    num_layers = _positive_int(config, "num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise PartitionError(f"num_hidden_layers is {num_layers}; at most {MAX_LAYERS} make sense")
    hidden_size = _positive_int(config, "hidden_size")
    num_heads = _positive_int(config, "num_attention_heads")
    head_dim = config.get("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise PartitionError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
                "and head_dim is not given"
            )
        head_dim = hidden_size // num_heads
    num_kv_heads = config.get("num_key_value_heads")
    try:
        return DecoderConfig.model_validate(
            {
                "family": name,
                "hidden_size": hidden_size,
                "intermediate_size": config["intermediate_size"],
                "num_layers": num_layers,
                "num_heads": num_heads,
                "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
                "head_dim": head_dim,
                "vocab_size": config["vocab_size"],
                "max_positions": config["max_position_embeddings"],
                "rms_norm_eps": config["rms_norm_eps"],
                "rope": _rope(config),
                "tie_word_embeddings": config.get("tie_word_embeddings", False),
                "bos_token_id": config.get("bos_token_id"),
                "eos_token_ids": _token_ids(config.get("eos_token_id")),
                **family.variations(config),
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "model configuration"
        raise PartitionError(f"{field}: {first['msg']}") from error


def _family(config: Fields) -> tuple[str, Family]:
    """Find the family, by ``model_type`` and, where the file says it, its class."""
    model_type = config.get("model_type")
    supported = ", ".join(FAMILIES)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise PartitionError(f"unsupported architecture {model_type!r}; supported: {supported}")
    family = FAMILIES[model_type]
    classes = config.get("architectures")
    if classes is not None and (
        not isinstance(classes, list) or family.architecture not in classes
    ):
        raise PartitionError(
            f"unsupported architecture {classes!r} of {model_type}; expected {family.architecture} "
            f"(supported: {supported})"
        )
    return model_type, family


def _refuse_unsupported(config: Fields) -> None:
    """Raise for settings that change the arithmetic in a way the engine does not follow."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise PartitionError(f"hidden_act {activation!r} is not supported; only silu is")
    if config.get("pretraining_tp") not in (None, 1):
        raise PartitionError(
            f"pretraining_tp {config['pretraining_tp']!r} is not supported; set it to 1 in "
            "config.json if the checkpoint allows it"
        )
    if config.get("quantization_config"):
        raise PartitionError(
            "the checkpoint is quantised (quantization_config); use the unquantised one or a GGUF"
        )


def _rope(config: Fields) -> RopeConfig:
    """Rotary settings from ``rope_parameters``, or from ``rope_theta`` and ``rope_scaling``."""
    # The order is that of transformers, which lets the older field override the newer one.
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise PartitionError("rope_scaling must be an object")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise PartitionError("rope parameters that differ by layer type are not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise PartitionError(
            f"rope type {kind!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}"
        )
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise PartitionError(f"partial_rotary_factor {partial!r} is not supported; only 1 is")
    values = dict(parameters)
    original = config.get("original_max_position_embeddings")
    if original is not None:
        values["original_max_position_embeddings"] = original
    missing = [key for key in _ROPE_FIELDS[kind] if values.get(key) is None]
    if missing:
        raise PartitionError(f"rope scaling {kind} lacks {', '.join(missing)}")
    fields = {key: values[key] for key in _ROPE_FIELDS[kind]}
    if "original_max_position_embeddings" in fields:
        fields["original_max_positions"] = fields.pop("original_max_position_embeddings")
    theta = values.get("rope_theta")
    if theta is None:
        theta = config.get("rope_theta")
    # Llama-2's first configurations leave the base frequency out and mean 10000.
    rope = RopeConfig.model_validate(
        {"theta": 10_000.0 if theta is None else theta, "kind": kind, **fields}
    )
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise PartitionError(
            f"rope scaling llama3 needs low_freq_factor ({rope.low_freq_factor}) below "
            f"high_freq_factor ({rope.high_freq_factor})"
        )
    return rope


def _positive_int(config: Fields, key: str, minimum: int = 1) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise PartitionError(f"{key} must be a whole number of at least {minimum}, not {value!r}")
    return value


def _token_ids(value: object) -> list[object]:
    """One id, several, or none, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def layer_prefix(layer: int) -> str:
    """What the names of one layer's tensors start with."""
    return f"model.layers.{layer}."


def projection_weight(layer: int, target: str) -> str:
    """Name of the frozen weight of a layer's ``q``, ``k`` or ``v`` projection."""
    return f"{layer_prefix(layer)}self_attn.{target}_proj.weight"


def layer_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Shapes of one layer's tensors, by what follows ``layer_prefix`` in their names."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.projection_size("q"), config.projection_size("k")
    shapes: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    for target, size in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"self_attn.{target}_proj.weight"] = (size, hidden)
        if config.qkv_bias:
            shapes[f"self_attn.{target}_proj.bias"] = (size,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    shapes["self_attn.o_proj.weight"] = (hidden, q)
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    for name, size_out, size_in in (
        ("gate", inner, hidden),
        ("up", inner, hidden),
        ("down", hidden, inner),
    ):
        shapes[f"mlp.{name}_proj.weight"] = (size_out, size_in)
        if config.mlp_bias:
            shapes[f"mlp.{name}_proj.bias"] = (size_out,)
    return shapes


def layer_tensors(config: DecoderConfig, layer: int) -> dict[str, Shape]:
    """Full names and shapes of one layer's tensors."""
    prefix = layer_prefix(layer)
    return {prefix + suffix: shape for suffix, shape in layer_shapes(config).items()}


def tensor_names(config: DecoderConfig) -> dict[str, Shape]:
    """Every tensor of the model with its shape, in the order the model applies them.

    ``lm_head.weight`` is among them unless it is tied to the embedding.
    """
    names: dict[str, Shape] = {EMBED_TOKENS: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        names.update(layer_tensors(config, layer))
    names[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        names[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return names
