"""What holds for every payload codec."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privatelora.errors import ConfigError, RemoteProtocolError
from privatelora.runtime.payload.codec import CODEC_NAMES, decode, encode, plain_nbytes
from privatelora.runtime.wire.control import MAX_CODECS, check_codec_name
from tests.wire.tensors import CPU, DTYPES, each_dtype, random_tensor, received

UNCOMPRESSED = [name for name in CODEC_NAMES if not name.endswith("+lz4")]
# On numbers of a normal distribution, relative to their root mean square.
MAX_ERROR = {
    "fp32": 0.0,
    "fp16": 3e-4,
    "int12": 4e-4,
    "int10": 1.5e-3,
    "bf16": 2e-3,
    "int8": 6e-3,
    "int6": 2.4e-2,
    "fp8": 2.7e-2,
    "int4": 1.05e-1,
}
BITS = {
    "fp32": 32,
    "fp16": 16,
    "bf16": 16,
    "int12": 12.5,
    "int10": 10.5,
    "int8": 8.5,
    "fp8": 8.125,
    "int6": 6.5,
    "int4": 4.5,
}

each_codec = pytest.mark.parametrize("codec", CODEC_NAMES)
codecs = st.sampled_from(CODEC_NAMES)
dtypes = st.sampled_from(DTYPES)


def test_the_names_are_what_the_wire_takes() -> None:
    assert set(UNCOMPRESSED) == set(MAX_ERROR)
    assert set(CODEC_NAMES) == {*UNCOMPRESSED, *(name + "+lz4" for name in UNCOMPRESSED)}
    assert len(set(CODEC_NAMES)) == len(CODEC_NAMES) <= MAX_CODECS
    assert all(check_codec_name(name) == name for name in CODEC_NAMES)


@each_codec
def test_sizes_and_errors(codec: str) -> None:
    base = codec.removesuffix("+lz4")
    tensor = random_tensor(16, 1152)
    encoded = encode(tensor, codec)
    expected_nbytes = 16 * 1152 * BITS[base] / 8
    assert plain_nbytes(codec, (16, 1152)) == expected_nbytes
    assert encoded.data.nbytes <= expected_nbytes
    if codec == base:
        assert encoded.data.nbytes == expected_nbytes
    error = (received(encoded) - tensor).square().mean().sqrt() / tensor.square().mean().sqrt()
    assert error <= MAX_ERROR[base]
    assert error >= MAX_ERROR[base] / 2


@given(codecs, dtypes, dtypes, st.integers(0, 5), st.integers(0, 140), st.integers(0, 2**32))
@settings(deadline=None)
def test_any_tensor(
    codec: str, sent: torch.dtype, wanted: torch.dtype, rows: int, features: int, seed: int
) -> None:
    tensor = random_tensor(rows, features, seed).to(sent)
    before = tensor.clone()
    encoded = encode(tensor, codec)
    assert torch.equal(tensor, before)
    assert encoded.codec == codec
    assert encoded.shape == (rows, features)
    assert encoded.data.format == "B"
    assert encoded.data.ndim == 1
    assert encoded.data.nbytes <= plain_nbytes(codec, (rows, features))
    assert encode(tensor, codec).data == encoded.data
    result = received(encoded, wanted)
    assert result.dtype == wanted
    assert result.device == CPU
    assert result.shape == (rows, features)
    assert result.is_contiguous()
    exact = tensor.double()
    step = 0.08 * exact.abs().amax(dim=1, keepdim=True) if features else 0
    assert ((result.double() - exact).abs() <= step).all()


@given(codecs, st.integers(1, 6), st.integers(1, 200), st.integers(0, 2**32))
@settings(deadline=None)
def test_rows_do_not_depend_on_their_neighbours(
    codec: str, rows: int, features: int, seed: int
) -> None:
    tensor = random_tensor(rows, features, seed) * (10.0 ** torch.arange(rows)).unsqueeze(1)
    if codec.startswith("fp16"):
        tensor = tensor.clamp(-65504, 65504)
    together = received(encode(tensor, codec))
    alone = torch.cat([received(encode(row.unsqueeze(0), codec)) for row in tensor])
    assert torch.equal(together, alone)


@each_codec
@each_dtype
def test_any_layout_in_memory_may_be_sent(codec: str, dtype: torch.dtype) -> None:
    base = torch.arange(60.0).to(dtype)
    for tensor in (
        base.view(6, 10).t(),
        base.view(6, 10)[::2],
        base.view(6, 10)[:, 3:7],
        base[:10].expand(4, 10),
        base.view(6, 10).clone().requires_grad_(),
    ):
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        assert torch.equal(received(encode(tensor, codec)), received(encode(copy, codec)))


@each_codec
def test_inference_mode_makes_no_difference(codec: str) -> None:
    expected = received(encode(random_tensor(2, 150), codec))
    with torch.inference_mode():
        assert torch.equal(received(encode(random_tensor(2, 150), codec)), expected)


@each_codec
def test_a_received_tensor_may_be_changed(codec: str) -> None:
    encoded = encode(random_tensor(2, 150), codec)
    data = bytes(encoded.data)
    decode(codec, (2, 150), data, device=CPU, dtype=torch.float32).zero_()
    assert data == encoded.data


@each_codec
def test_empty_tensors_take_no_bytes(codec: str) -> None:
    for rows, features in ((0, 5), (5, 0), (0, 0)):
        encoded = encode(torch.zeros(rows, features), codec)
        assert encoded.data.nbytes == 0
        assert received(encoded).shape == (rows, features)
        with pytest.raises(RemoteProtocolError):
            decode(codec, (rows, features), b"\0", device=CPU, dtype=torch.float32)


@each_codec
@pytest.mark.parametrize(
    "shape", [(2, 200), (3, 99), (0, 99), (2, 0), (2**20, 2**20), (-2, -99), (2**40, 2**40)]
)
def test_bytes_that_are_not_of_the_shape_are_refused(codec: str, shape: tuple[int, int]) -> None:
    data = encode(random_tensor(2, 99), codec.removesuffix("+lz4")).data
    # Where a codec compresses, fewer bytes than the plain size may only turn out to be none.
    compressed = codec.endswith("+lz4") and shape in ((2, 200), (3, 99))
    message = "no LZ4 block" if compressed else f"{shape[0]} x {shape[1]} in {re.escape(codec)} "
    with pytest.raises(RemoteProtocolError, match=message):
        decode(codec, shape, data, device=CPU, dtype=torch.float32)
    for wrong in (data[:-1], bytes(data) + b"\0", b""):
        with pytest.raises(RemoteProtocolError):
            decode(codec, (2, 99), wrong, device=CPU, dtype=torch.float32)


@given(codecs, st.integers(0, 3), st.integers(0, 150), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_any_bytes_of_the_right_size(codec: str, rows: int, features: int, random: Random) -> None:
    data = random.randbytes(plain_nbytes(codec, (rows, features)))
    try:
        result = decode(codec, (rows, features), data, device=CPU, dtype=torch.float32)
    except RemoteProtocolError:
        assert codec.removesuffix("+lz4") not in ("fp32", "fp16", "bf16")
    else:
        assert result.shape == (rows, features)


@given(codecs, st.integers(-3, 2**53), st.integers(-3, 2**53), st.binary(max_size=64))
@settings(deadline=None)
def test_any_shape_with_any_bytes(codec: str, rows: int, features: int, data: bytes) -> None:
    try:
        result = decode(codec, (rows, features), data, device=CPU, dtype=torch.float32)
    except RemoteProtocolError:
        return
    assert result.shape == (rows, features)
    assert result.numel() <= 255 * 2 * len(data)


def test_an_unknown_codec_is_the_fault_of_whoever_named_it() -> None:
    for name in ("int3", "int8+zstd", "lz4", "+lz4", "int8+lz4+lz4", ""):
        with pytest.raises(ConfigError, match=re.escape(repr(name)) + r".*fp16, bf16"):
            encode(torch.ones(1, 1), name)
        with pytest.raises(RemoteProtocolError, match=re.escape(repr(name)) + r".*fp16, bf16"):
            decode(name, (1, 1), b"1", device=CPU, dtype=torch.float32)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_codec
@each_dtype
def test_on_a_gpu(codec: str, dtype: torch.dtype) -> None:
    cuda = torch.device("cuda")
    tensor = random_tensor(3, 150).to(dtype)
    encoded = encode(tensor.to(cuda), codec)
    assert encoded.data == encode(tensor, codec).data
    result = decode(codec, (3, 150), bytes(encoded.data), device=cuda, dtype=dtype)
    assert result.device.type == "cuda"
    assert torch.equal(result.cpu(), received(encoded, dtype))
