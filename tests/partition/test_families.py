"""Families: what a published configuration becomes, and which tensors it calls for."""

import copy
from typing import Any

import pytest
from transformers import LlamaConfig

from privatelora.errors import PartitionError
from privatelora.partition.models.families import (
    FAMILIES,
    MAX_LAYERS,
    Family,
    from_hf_config,
    layer_tensors,
    projection_weight,
    tensor_names,
)
from tests.partition import tiny

# Configurations as published, before transformers 5.
LLAMA2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA31_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_llama_2_as_first_published() -> None:
    config = from_hf_config(LLAMA2)
    assert config.num_kv_heads == 32
    assert config.head_dim == 128
    assert config.rope.theta == 10_000.0
    assert config.rope.kind == "default"
    assert config.eos_token_ids == (2,)
    assert not config.tie_word_embeddings


def test_qwen_2_5_has_biases_and_no_window() -> None:
    config = from_hf_config(QWEN25)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)
    assert config.sliding_layers == ()
    assert config.bos_token_id is None


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_llama_3_rope_in_the_old_style(key: str) -> None:
    scaling = {k: v for k, v in LLAMA31_ROPE.items() if k != "rope_type"} | {key: "llama3"}
    config = from_hf_config(LLAMA2 | {"rope_theta": 500_000.0, "rope_scaling": scaling})
    assert config.rope.model_dump() == {
        "theta": 500_000.0,
        "kind": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_positions": 8192,
    }


def test_old_and_new_style_agree() -> None:
    old = LLAMA2 | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {k: v for k, v in LLAMA2.items() if k != "rope_scaling"} | {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    }
    assert from_hf_config(old) == from_hf_config(new)
    assert from_hf_config(new).rope.factor == 2.0


def test_old_style_wins_as_in_transformers() -> None:
    both = LLAMA2 | {
        "rope_theta": 5e5,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    theirs: Any = LlamaConfig(**copy.deepcopy(both)).rope_parameters
    rope = from_hf_config(both).rope
    assert (rope.factor, rope.theta) == (theirs["factor"], theirs["rope_theta"]) == (4.0, 5e5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}],
    ids=["plain", "tied", "biases"],
)
def test_tensors_are_those_of_transformers(family: str, overrides: dict[str, Any]) -> None:
    model = tiny.tiny_model(family, **overrides)
    config = from_hf_config(model.config.to_dict())
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert tensor_names(config) == theirs


def test_layer_names() -> None:
    config = from_hf_config(LLAMA2)
    assert layer_tensors(config, 7)[projection_weight(7, "k")] == (4096, 4096)
    assert set(layer_tensors(config, 7)) < set(tensor_names(config))


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_sliding_window": False, "sliding_window": 16},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 9},
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows_are_those_of_transformers(family: str, overrides: dict[str, Any]) -> None:
    theirs = tiny.FAMILIES[family].config(**tiny.COMMON, **overrides)
    layers = tuple(i for i, k in enumerate(theirs.layer_types) if k == "sliding_attention")
    published = theirs.to_dict() | overrides
    if "layer_types" not in overrides:
        del published["layer_types"]
    config = from_hf_config(published)
    assert config.sliding_layers == layers
    assert config.sliding_window == (16 if layers else None)


def test_mistral_windows() -> None:
    mistral = LLAMA2 | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert from_hf_config(mistral | {"sliding_window": None}).sliding_layers == ()
    assert from_hf_config(mistral | {"sliding_window": 16}).sliding_layers == tuple(range(32))
    assert from_hf_config(mistral).sliding_window == 4096


def test_several_end_tokens() -> None:
    assert from_hf_config(LLAMA2 | {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert from_hf_config(LLAMA2 | {"eos_token_id": None}).eos_token_ids == ()


def test_a_further_family_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", Family("ToyForCausalLM", lambda _: {"qkv_bias": True}))
    config = from_hf_config(LLAMA2 | {"model_type": "toy", "architectures": ["ToyForCausalLM"]})
    assert config.family == "toy"
    assert "model.layers.0.self_attn.v_proj.bias" in tensor_names(config)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "gemma2"}, "gemma2.*llama, mistral, qwen2, qwen3"),
    "no family": ({"model_type": None}, "unsupported architecture None"),
    "odd family": ({"model_type": ["llama"]}, "unsupported architecture"),
    "class": ({"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM"),
    "missing": ({"rms_norm_eps": None, "vocab_size": None}, "lacks vocab_size, rms_norm_eps"),
    "activation": ({"hidden_act": "gelu"}, "gelu"),
    "pretraining_tp": ({"pretraining_tp": 2}, "pretraining_tp 2"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn.*default, linear, llama3"),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    "odd rope": ({"rope_scaling": {"rope_type": ["linear"]}}, "rope type"),
    "rope list": ({"rope_scaling": [1]}, "must be an object"),
    "nested rope": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "layer type"),
    "linear": ({"rope_scaling": {"type": "linear"}}, "linear lacks factor"),
    "llama3": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        "lacks high_freq_factor, original_max_position_embeddings",
    ),
    "llama3 order": ({"rope_scaling": LLAMA31_ROPE | {"low_freq_factor": 4.0}}, "below"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "partial, new style": ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "0.25"),
    "heads": ({"num_attention_heads": 30}, "not a multiple of num_attention_heads 30"),
    "kv heads": ({"num_key_value_heads": 5}, "multiple of"),
    "text": ({"num_hidden_layers": "many"}, "num_hidden_layers must be"),
    "bool": ({"hidden_size": True}, "hidden_size must be"),
    "negative": ({"intermediate_size": -1}, "intermediate_size"),
    "too many": ({"num_hidden_layers": 10**12}, f"at most {MAX_LAYERS}"),
    "theta": ({"rope_theta": -1.0}, "theta"),
    "end token": ({"eos_token_id": ["x"]}, "eos_token_ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(PartitionError, match=message):
        from_hf_config(LLAMA2 | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "each of 24 layers"),
        ({"layer_types": ["linear_attention"] * 24}, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 24}, "use_sliding_window is not set"),
        ({"use_sliding_window": True, "max_window_layers": None}, "max_window_layers"),
    ],
)
def test_refused_windows(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        from_hf_config(QWEN25 | changes)


def test_qwen_3_needs_its_head_dimension() -> None:
    qwen3 = QWEN25 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    with pytest.raises(PartitionError, match="lacks head_dim"):
        from_hf_config(qwen3)
    config = from_hf_config(qwen3 | {"head_dim": 128})
    assert config.qk_norm
    assert config.projection_size("q") == 14 * 128
