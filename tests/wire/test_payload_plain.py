"""Codecs that write numbers as they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privatelora.errors import ConfigError
from privatelora.runtime.payload.codec import decode, encode
from tests.wire.tensors import CPU, DTYPES, address_of, each_dtype, received

FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

each_codec = pytest.mark.parametrize("codec", FORMATS)
codecs = st.sampled_from(list(FORMATS))
dtypes = st.sampled_from(DTYPES)
sizes = st.integers(0, 9)


@given(codecs, dtypes, dtypes, sizes, sizes, st.integers(0, 2**32))
@settings(deadline=None)
def test_a_tensor_survives_as_well_as_its_codec_allows(
    codec: str, sent: torch.dtype, wanted: torch.dtype, rows: int, features: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, features, generator=generator).to(sent)
    encoded = encode(tensor, codec)
    assert encoded.codec == codec
    assert encoded.shape == (rows, features)
    assert encoded.data.nbytes == rows * features * FORMATS[codec].itemsize
    assert encoded.data.format == "B"
    assert encoded.data.ndim == 1
    result = received(encoded, wanted)
    assert result.dtype == wanted
    torch.testing.assert_close(result, tensor.to(FORMATS[codec]).to(wanted), rtol=0, atol=0)


@each_codec
def test_every_bit_pattern_of_a_codec_survives(codec: str) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if FORMATS[codec].itemsize == 2:
        tensor = patterns.to(torch.int16).view(FORMATS[codec]).view(256, 256)
    else:
        tensor = (patterns * 65537).view(torch.float32).view(256, 256)
    encoded = encode(tensor, codec)
    again = encode(received(encoded, FORMATS[codec]), codec)
    assert encoded.data == again.data


def test_the_bytes_are_those_of_the_specification() -> None:
    tensor = torch.tensor([[1.0, -2.0], [0.5, 65504.0]])
    assert encode(tensor, "fp32").data.hex() == "0000803f000000c00000003f00e07f47"
    assert encode(tensor, "fp16").data.hex() == "003c00c00038ff7b"
    assert encode(tensor, "bf16").data.hex() == "803f00c0003f8047"


@each_codec
@each_dtype
def test_nan_and_infinities_survive(codec: str, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0]], dtype=dtype)
    result = received(encode(tensor, codec), dtype)
    assert torch.equal(result.isnan(), tensor.isnan())
    assert torch.equal(result.nan_to_num(7), tensor.nan_to_num(7))
    assert torch.equal(result.signbit()[0, :2], tensor.signbit()[0, :2])
    assert math.copysign(1, result[0, 4].item()) == -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("others", [[0.0], [math.nan], [math.inf, -math.inf]], ids=repr)
def test_a_value_too_large_for_fp16_is_an_error(dtype: torch.dtype, others: list[float]) -> None:
    tensor = torch.tensor([[1.0, *others, -70144.0]], dtype=dtype)
    with pytest.raises(ConfigError, match=r"-70144 .*use bf16 or fp32"):
        encode(tensor, "fp16")
    encode(tensor, "bf16")
    encode(tensor[:, :-1], "fp16")


@each_codec
def test_encoding_copies_nothing_it_need_not(codec: str) -> None:
    whole = torch.randn(6, 5).to(FORMATS[codec])
    for tensor in (whole, whole[2:4]):
        assert address_of(encode(tensor, codec).data) == tensor.data_ptr()


@each_codec
def test_encoded_bytes_outlive_the_tensor(codec: str) -> None:
    data = encode(torch.full((64, 64), 1.5, dtype=FORMATS[codec]), codec).data
    others = [torch.zeros(64, 64, dtype=FORMATS[codec]) for _ in range(10)]
    result = decode(codec, (64, 64), bytes(data), device=CPU, dtype=torch.float32)
    assert (result == 1.5).all()
    assert len(others) == 10


@each_codec
def test_decoding_uses_the_memory_of_the_frame(codec: str) -> None:
    frame = memoryview(bytearray(4096))
    tensor = decode(
        codec,
        (2, 8),
        frame[64 : 64 + 16 * FORMATS[codec].itemsize],
        device=CPU,
        dtype=FORMATS[codec],
    )
    assert tensor.data_ptr() == address_of(frame) + 64
    frame[64:] = encode(torch.ones(2, 8), codec).data.tobytes().ljust(4096 - 64, b"\0")
    del frame
    assert (tensor == 1).all()


@each_codec
@pytest.mark.parametrize("wrap", [bytes, lambda data: memoryview(bytes(data))])
def test_read_only_bytes_are_copied(codec: str, wrap: Callable[[memoryview], bytes]) -> None:
    tensor = torch.randn(3, 4).to(FORMATS[codec])
    data = wrap(encode(tensor, codec).data)
    result = decode(codec, (3, 4), data, device=CPU, dtype=FORMATS[codec])
    assert torch.equal(result, tensor)
    before = bytes(data)
    result.zero_()
    assert bytes(data) == before


@each_codec
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_frames_need_no_alignment(codec: str, offset: int) -> None:
    tensor = torch.randn(3, 100).to(FORMATS[codec])
    data = encode(tensor, codec).data
    frame = memoryview(bytearray(offset) + data)
    result = decode(codec, (3, 100), frame[offset:], device=CPU, dtype=FORMATS[codec])
    assert torch.equal(result, tensor)
    assert torch.equal(result @ torch.eye(100, dtype=result.dtype), tensor)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_codec
@each_dtype
def test_on_a_gpu(codec: str, dtype: torch.dtype) -> None:
    cuda = torch.device("cuda")
    tensor = torch.randn(3, 4, device=cuda).to(dtype)
    encoded = encode(tensor, codec)
    result = decode(codec, (3, 4), bytes(encoded.data), device=cuda, dtype=dtype)
    assert result.device.type == "cuda"
    assert torch.equal(result, tensor.to(FORMATS[codec]).to(dtype))
    if codec == "fp16" and dtype is not torch.float16:
        with pytest.raises(ConfigError):
            encode(tensor * 1e6 + 1e6, codec)
