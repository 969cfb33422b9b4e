"""Reading GGUF files, against files written by the gguf package itself."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import RopeScalingType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.checkpoint.gguf_header import parse_header
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import EMBED_TOKENS, LM_HEAD, from_hf_config
from tests.partition.tiny import tiny_model

Type = gguf.GGMLQuantizationType
Edit = Callable[[gguf.GGUFWriter], None]

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows as llama.cpp's converter does: (first, second) halves of a head in turn."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    family: str = "llama",
    *,
    encoding: gguf.GGMLQuantizationType = Type.F32,
    edit: Edit = lambda writer: None,
    drop: str = "",
    **overrides: Any,
) -> Path:
    """Write a tiny model; ``edit`` adds keys or tensors, ``drop`` leaves a key out."""
    model = tiny_model(family, **{"num_hidden_layers": 2, **overrides})
    config = model.config
    arch = {"llama-tied": "llama", "mistral": "llama"}.get(family, family)
    writer = gguf.GGUFWriter(path, arch)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    for key, value in numbers.items():
        if key != drop:
            writer.add_uint32(f"{arch}.{key}", value)
    if drop != "attention.layer_norm_rms_epsilon":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.token_type", [1] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    edit(writer)
    arch_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == LM_HEAD and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        if arch == "llama" and ".q_proj." in name:
            weight = interleave(weight, config.num_attention_heads)
        elif arch == "llama" and ".k_proj." in name:
            weight = interleave(weight, config.num_key_value_heads)
        stored = encoding if weight.ndim == 2 else Type.F32
        gguf_name = arch_names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, gguf.quants.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(PartitionError, match=message) as caught:
        open_checkpoint(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def without_ids(config: DecoderConfig) -> dict[str, Any]:
    return config.model_dump(exclude={"bos_token_id", "eos_token_ids", "rms_norm_eps"})


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama-tied", {"num_key_value_heads": 1}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
@pytest.mark.parametrize("encoding", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1])
def test_reads_what_was_written(
    tmp_path: Path, family: str, overrides: dict[str, Any], encoding: gguf.GGMLQuantizationType
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", family, encoding=encoding, **overrides)
    model = tiny_model(family, num_hidden_layers=2, **overrides)
    kept = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}.get(encoding, torch.float32)
    with open_checkpoint(str(path)) as checkpoint:
        assert without_ids(checkpoint.config) == without_ids(from_hf_config(model.config.to_dict()))
        assert checkpoint.config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps, rel=1e-6)
        assert checkpoint.config.bos_token_id == 1
        assert checkpoint.config.eos_token_ids == (2,)
        assert checkpoint.source == str(path)
        assert checkpoint.tokenizer_source.gguf_file == "tiny.gguf"
        for name in checkpoint.names():
            weight = model.state_dict()[name]
            tensor = checkpoint.read(name)
            if weight.ndim == 2:
                rounded = gguf.quants.dequantize(
                    gguf.quants.quantize(weight.numpy(), encoding), encoding
                )
                weight = torch.from_numpy(rounded).to(kept)
            assert torch.equal(tensor, weight)
            assert tensor.is_contiguous()
            assert tensor.dtype is checkpoint.dtype(name)
            assert tuple(tensor.shape) == checkpoint.shape(name)


def test_mistral_files_say_llama(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "mistral")
    weight = tiny_model("mistral", num_hidden_layers=2).state_dict()[Q_PROJ]
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.config.family == "llama"
        assert torch.equal(checkpoint.read(Q_PROJ), weight)


def test_end_of_turn_is_an_end(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", edit=lambda w: w.add_eot_token_id(9))
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.config.eos_token_ids == (2, 9)


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_freq_base(5e5)


def test_linear_rope(tmp_path: Path) -> None:
    with open_checkpoint(str(write_gguf(tmp_path / "m.gguf", edit=linear))) as checkpoint:
        rope = checkpoint.config.rope
        assert (rope.kind, rope.factor, rope.theta) == ("linear", 4.0, 5e5)


def llama3_factors(factor: float, original: int, dim: int = 16) -> np.ndarray:
    """What llama.cpp's converter stores for Llama 3's scaling, from its definition."""
    factors = []
    for exponent in np.arange(0, dim, 2) / dim:
        wavelength = 2 * np.pi * 10_000.0**exponent
        if wavelength < original / 4.0:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / 3.0
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 64)])
def test_llama_3_rope(tmp_path: Path, factor: float, original: int) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        if original != 8192:
            writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_tensor("rope_freqs.weight", llama3_factors(factor, original))

    with open_checkpoint(str(write_gguf(tmp_path / "m.gguf", edit=edit))) as checkpoint:
        assert checkpoint.config.rope.model_dump() == {
            "theta": 10_000.0,
            "kind": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_positions": original,
        }
        assert "rope_freqs.weight" not in checkpoint.names()


def add_factors(factors: np.ndarray) -> Edit:
    return lambda writer: writer.add_tensor("rope_freqs.weight", factors)


def both_scalings(writer: gguf.GGUFWriter) -> None:
    linear(writer)
    writer.add_tensor("rope_freqs.weight", llama3_factors(8.0, 8192))


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown tensor": (
        {"edit": lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.ones(3, np.float32))},
        r"holds blk\.0\.ffn_gate_exps\.weight",
    ),
    "experts": ({"edit": lambda w: w.add_expert_count(8)}, r"llama\.expert_count is set"),
    "window": ({"edit": lambda w: w.add_sliding_window(64)}, r"llama\.attention\.sliding_window"),
    "split": ({"edit": lambda w: w.add_uint16("split.count", 3)}, "split over 3 files"),
    "yarn": ({"edit": yarn}, "'yarn' is not supported"),
    "factors": ({"edit": add_factors(np.linspace(1, 8, 8, dtype=np.float32))}, "not the rope"),
    "factor shape": ({"edit": add_factors(np.full(3, 8.0, np.float32))}, "not the rope scaling"),
    "factor type": ({"edit": add_factors(np.ones(8, np.float16))}, "not a float32 vector"),
    "two scalings": ({"edit": both_scalings}, "together with rope scaling linear"),
    "no depth": ({"drop": "block_count"}, r"llama\.block_count is missing"),
    "no epsilon": ({"drop": "attention.layer_norm_rms_epsilon"}, "rms_epsilon is missing"),
    "per layer": (
        {
            "drop": "feed_forward_length",
            "edit": lambda w: w.add_feed_forward_length([96, 48]),
        },
        "no single whole number",
    ),
    "partial rotation": (
        {"drop": "rope.dimension_count", "edit": lambda w: w.add_rope_dimension_count(8)},
        "rope.dimension_count differs",
    ),
    "text for a number": (
        {"drop": "block_count", "edit": lambda w: w.add_string("llama.block_count", "2")},
        "no single whole number",
    ),
    "too deep": (
        {"drop": "block_count", "edit": lambda w: w.add_uint32("llama.block_count", 2**31)},
        "num_hidden_layers is 2147483648",
    ),
    "wrong width": (
        {"drop": "feed_forward_length", "edit": lambda w: w.add_feed_forward_length(64)},
        r"mlp\.gate_proj\.weight has shape \[96, 64\]",
    ),
    "output bias": (
        {"edit": lambda w: w.add_tensor("output.bias", np.ones(4, np.int8))},
        r"holds output\.bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    arguments, message = REFUSED[case]
    refused(write_gguf(tmp_path / "m.gguf", **arguments), message)


def test_unsupported_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"gemma", 1))
    refused(path, r"architecture 'gemma'; supported: llama, qwen2, qwen3")


def test_encoding_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    place = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    data[place : place + 4] = struct.pack("<I", Type.I32)  # as wide as F32
    path.write_bytes(data)
    refused(path, "encoded as I32 are not supported")
    data[place : place + 4] = struct.pack("<I", 9999)
    path.write_bytes(data)
    refused(path, r"token_embd\.weight has unknown encoding 9999")


def test_closed_and_unknown(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf")))
    with pytest.raises(PartitionError, match=r"holds no tensor output\.weight"):
        checkpoint.read("output.weight")
    tensor = checkpoint.read(EMBED_TOKENS)
    checkpoint.close()
    checkpoint.close()
    assert tensor.isfinite().all()  # owns its memory
    with pytest.raises(PartitionError, match="is closed"):
        checkpoint.read(DOWN)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    refused(path, "does not exist")
    path.write_bytes(b"")
    refused(path, "is empty")
    path.write_bytes(b"PK\3\4" + bytes(100))
    refused(path, "not a GGUF file")
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(100))
    refused(path, "GGUF version 1")
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(100))
    refused(path, "big-endian")


def test_truncated_at_any_point(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "m.gguf").read_bytes()
    for keep in [*range(4, 200, 7), *range(200, len(data), len(data) // 50), len(data) - 1]:
        with pytest.raises(PartitionError, match="truncated"):
            parse_header(data[:keep], "m.gguf")


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<Q", 2**63),  # a key of many exabytes
        string(b"k") + struct.pack("<I", 8) + struct.pack("<Q", 2**40),
        string(b"k") + struct.pack("<IIQ", 9, 0, 2**62),  # an array of bytes without end
        string(b"k") + struct.pack("<IIQ", 9, 8, 2**62),  # the same of strings
        string(b"k") + struct.pack("<IIQ", 9, 9, 2**62),  # and of arrays
        string(b"k") + struct.pack("<I", 77),
        string(b"\xff") + struct.pack("<I", 0),
    ],
)
def test_hostile_lengths_are_not_followed(body: bytes) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + body + bytes(64)
    with pytest.raises(PartitionError, match=r"m\.gguf: (truncated|damaged|metadata of unknown)"):
        parse_header(data, "m.gguf")


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((), "0 dimensions"),
        ((1,) * 5, "5 dimensions"),
        ((2**40, 2**40), "ends at"),
        ((0,), "shape"),
    ],
)
def test_hostile_shapes(dims: tuple[int, ...], message: str) -> None:
    entry = string(b"t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, 0)
    with pytest.raises(PartitionError, match=message):
        parse_header(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry + bytes(64), "m.gguf")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, num_hidden_layers=1, vocab_size=20, hidden_size=16, num_attention_heads=2)
    return path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_damage_is_a_partition_error_or_harmless(
    small_file: bytes, edits: list[tuple[float, int]]
) -> None:
    data = bytearray(small_file)
    header_nbytes = data.index(b"output_norm.weight") + 60
    for place, value in edits:
        data[int(place * (header_nbytes - 1))] = value
    try:
        header = parse_header(bytes(data), "m.gguf")
    except PartitionError:
        return
    assert all(t.start + t.nbytes <= len(data) for t in header.tensors.values())
