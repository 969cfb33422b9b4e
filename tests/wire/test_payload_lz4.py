"""Codecs that compress."""

from __future__ import annotations

import tracemalloc

import lz4.block
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privatelora.errors import ConfigError, RemoteProtocolError
from privatelora.runtime.payload.codec import CODEC_NAMES, decode, encode
from tests.wire.tensors import CPU, address_of, random_tensor, received

BASES = [name.removesuffix("+lz4") for name in CODEC_NAMES if name.endswith("+lz4")]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

each_base = pytest.mark.parametrize("base", BASES)
bases = st.sampled_from(BASES)


def packed(data: bytes) -> bytes:
    block: bytes = lz4.block.compress(data, store_size=False)  # type: ignore[attr-defined]
    return block


def unpacked(block: bytes, nbytes: int) -> bytes:
    data: bytes = lz4.block.decompress(block, uncompressed_size=nbytes)  # type: ignore[attr-defined]
    return data


def compressible(rows: int = 4, features: int = 256) -> torch.Tensor:
    """A few numbers over and over."""
    return torch.arange(8.0).repeat(rows, features // 8)


def refused(codec: str, shape: tuple[int, int], data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(codec, shape, data, device=CPU, dtype=torch.float32)


@given(bases, st.integers(1, 4), st.integers(1, 300), st.integers(0, 2**32), st.integers(0, 20))
@settings(deadline=None)
def test_nothing_is_lost_and_nothing_grows(
    base: str, rows: int, features: int, seed: int, num_values: int
) -> None:
    tensor = random_tensor(rows, features, seed)
    if num_values:
        tensor = (tensor * num_values).round()
    plain, encoded = encode(tensor, base), encode(tensor, base + "+lz4")
    assert encoded.codec == base + "+lz4"
    assert encoded.data.nbytes <= plain.data.nbytes
    if encoded.data.nbytes == plain.data.nbytes:
        assert encoded.data == plain.data
    assert torch.equal(received(encoded), received(plain))


@each_base
def test_what_repeats_takes_fewer_bytes(base: str) -> None:
    plain, encoded = encode(compressible(), base), encode(compressible(), base + "+lz4")
    assert encoded.data.nbytes < plain.data.nbytes / 4
    assert torch.equal(received(encoded), received(plain))


@each_base
def test_nothing_is_smaller_than_a_byte_for_255(base: str) -> None:
    """So that the receiver's bound never refuses what is right."""
    tensor = torch.zeros(256, 4096)
    encoded = encode(tensor, base + "+lz4")
    assert encoded.data.nbytes < encode(tensor, base).data.nbytes / 200
    assert torch.equal(received(encoded), tensor)


@pytest.mark.parametrize("base", sorted({*BASES} - {"fp32", "bf16"}))
def test_noise_is_sent_as_it_is(base: str) -> None:
    tensor = random_tensor(1, 384)
    assert encode(tensor, base + "+lz4").data == encode(tensor, base).data


@pytest.mark.parametrize(("base", "share"), [("fp32", 0.96), ("bf16", 0.9)])
def test_exponents_of_noise_are_compressed(base: str, share: float) -> None:
    tensor = random_tensor(16, 384)
    plain, encoded = encode(tensor, base), encode(tensor, base + "+lz4")
    assert encoded.data.nbytes < share * plain.data.nbytes
    assert torch.equal(received(encoded), received(plain))


@pytest.mark.parametrize("base", FLOATS)
def test_nan_and_infinities_survive(base: str) -> None:
    tensor = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0] * 50])
    encoded = encode(tensor, base + "+lz4")
    assert encoded.data.nbytes < 100
    assert torch.equal(received(encoded).nan_to_num(7), tensor.nan_to_num(7))


@pytest.mark.parametrize("base", sorted({*BASES} - {"fp32", "bf16"}))
def test_errors_are_those_of_the_codec_below(base: str) -> None:
    with pytest.raises(ConfigError, match=f"codec {base} cannot carry"):
        encode(torch.full((2, 2), 3.4e38), base + "+lz4")


def test_the_planes_are_those_of_the_specification() -> None:
    tensor = torch.tensor([[1.0, -2.0]]).repeat(1, 32)  # 0x3c00 and 0xc000 in fp16
    data = bytes(encode(tensor, "fp16+lz4").data)
    assert unpacked(data, 128) == b"\x3c\xc0" * 32 + bytes(64)
    tensor = torch.tensor([[1.0, -2.0]]).repeat(1, 32)  # 0x3f800000 and 0xc0000000
    data = bytes(encode(tensor, "fp32+lz4").data)
    planes = b"\x3f\xc0" * 32 + b"\x80\0" * 32 + bytes(128)
    assert unpacked(data, 256) == planes
    for base in set(BASES) - set(FLOATS):
        plain, encoded = encode(compressible(), base), encode(compressible(), base + "+lz4")
        planes = unpacked(bytes(encoded.data), plain.data.nbytes)
        assert planes == plain.data


def test_a_block_from_another_compressor_is_read() -> None:
    """Literals alone, by the LZ4 block format, which happen to be smaller with fp32's zeros."""
    planes = b"\x3f" * 8 + b"\x80" * 8 + bytes(16)
    # 1 literal and 7 + 4 - 4 more; again; 1 literal, 10 + 4 more; the last literal.
    block = b"\x13\x3f\x01\0" + b"\x13\x80\x01\0" + b"\x16\0\x01\0" + b"\x50" + bytes(5)
    assert unpacked(block, 32) == planes
    assert len(block) < 32
    result = decode("fp32+lz4", (1, 8), block, device=CPU, dtype=torch.float32)
    assert result.tolist() == [[1.0] * 8]


@each_base
def test_a_block_cut_off_anywhere(base: str) -> None:
    encoded = encode(compressible(), base + "+lz4")
    for end in range(encoded.data.nbytes):
        refused(encoded.codec, encoded.shape, bytes(encoded.data[:end]))


@each_base
def test_a_block_with_a_byte_too_many(base: str) -> None:
    encoded = encode(compressible(), base + "+lz4")
    refused(encoded.codec, encoded.shape, bytes(encoded.data) + b"\0")


@given(bases, st.data())
@settings(deadline=None)
def test_a_damaged_block(base: str, data: st.DataObject) -> None:
    encoded = encode(compressible(), base + "+lz4")
    damaged = bytearray(encoded.data)
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= data.draw(st.integers(1, 255))
    try:
        result = decode(encoded.codec, encoded.shape, damaged, device=CPU, dtype=torch.float32)
    except RemoteProtocolError:
        return
    assert result.shape == encoded.shape


@given(bases, st.integers(1, 4), st.integers(1, 64), st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes(base: str, rows: int, features: int, data: bytes) -> None:
    try:
        result = decode(base + "+lz4", (rows, features), data, device=CPU, dtype=torch.float32)
    except RemoteProtocolError:
        return
    assert result.shape == (rows, features)


@each_base
def test_a_block_of_another_size(base: str) -> None:
    """Smaller or larger than the tensor, however good the block."""
    size = encode(torch.zeros(4, 256), base).data.nbytes
    for nbytes in (0, 1, size - 1, size + 1, 100 * size):
        block = packed(bytes(nbytes))
        refused(base + "+lz4", (4, 256), block)


@each_base
@pytest.mark.parametrize("shape", [(2**20, 2**20), (2**12, 2**14), (2**20, 2**9)])
def test_bombs_take_no_memory(base: str, shape: tuple[int, int]) -> None:
    """Neither a shape that a payload cannot have nor a block larger than the shape."""
    bomb = packed(bytes(2**22))
    tracemalloc.start()
    try:
        refused(base + "+lz4", shape, bomb)
        refused(base + "+lz4", (16, 4096), bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@each_base
def test_the_result_has_memory_of_its_own(base: str) -> None:
    frame = memoryview(bytearray(encode(compressible(), base + "+lz4").data))
    result = decode(base + "+lz4", (4, 256), frame, device=CPU, dtype=torch.float32)
    assert not 0 <= result.data_ptr() - address_of(frame) < frame.nbytes
    expected = result.clone()
    frame[:] = bytes(frame.nbytes)
    assert torch.equal(result, expected)
