"""Codecs of small numbers with a scale for every group."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privatelora.errors import ConfigError, RemoteProtocolError
from privatelora.runtime.payload.codec import decode, encode
from tests.wire.tensors import CPU, DTYPES, address_of, each_dtype, random_tensor, received

FLOAT32_MAX = torch.finfo(torch.float32).max
MIN_SCALE = 2.0**-126


@dataclass(frozen=True)
class Spec:
    """What docs/PROTOCOL.md says of a codec."""

    group: int
    planes: tuple[int, ...]
    max_scale: int

    @property
    def bits(self) -> int:
        return sum(self.planes)

    def nbytes(self, rows: int, features: int) -> int:
        codes = sum(math.ceil(features * width / 8) for width in self.planes)
        return rows * (2 * math.ceil(features / self.group) + codes)


SPECS = {
    "int12": Spec(32, (8, 4), 0x79FF),
    "int10": Spec(32, (8, 2), 0x7AFF),
    "fp8": Spec(128, (8,), 0x7B12),
    "int8": Spec(32, (8,), 0x7BFF),
    "int6": Spec(32, (4, 2), 0x7CFF),
    "int4": Spec(32, (4,), 0x7DFF),
}
INTEGERS = [name for name in SPECS if name.startswith("int")]

each_codec = pytest.mark.parametrize("codec", SPECS)
codecs = st.sampled_from(list(SPECS))


def value_of(codec: str, code: int) -> float:
    if codec != "fp8":
        return code - 2.0 ** (SPECS[codec].bits - 1)
    sign, exponent, mantissa = 1 - 2 * (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)


def read(codec: str, rows: int, features: int, data: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and the scale of each, both (rows, features) in float64, one at a time."""
    spec = SPECS[codec]
    groups = math.ceil(features / spec.group)
    halves = struct.unpack_from(f"<{rows * groups}H", data)
    start = 2 * rows * groups
    codes = [[0] * features for _ in range(rows)]
    shift = 0
    for width in spec.planes:
        nbytes = math.ceil(features * width / 8)
        for row in codes:
            for i in range(features):
                in_byte = data[start + i % nbytes] >> (i // nbytes * width)
                row[i] |= (in_byte & (2**width - 1)) << shift
            start += nbytes
        shift += width
    assert start == len(data)
    scales = [
        [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves[g : g + groups]]
        for g in range(0, len(halves), groups)
    ]
    spread = [[row[i // spec.group] for i in range(features)] for row in scales]
    values = [[value_of(codec, code) for code in row] for row in codes]
    wide = torch.tensor(spread, dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64) * wide, wide


def half_steps(codec: str, numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Largest error allowed, which leaves some for rounding in float32."""
    if codec != "fp8":
        return 0.5005 * scales
    return torch.maximum(numbers.abs() * 2**-4, scales * 2**-10) * 1.001


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Numbers near and far from each other, from subnormal ones to 1e38."""
    rows, features = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    scale = torch.tensor(10.0, dtype=torch.float64) ** draw(st.integers(-44, 37))
    numbers = random_tensor(rows, features, draw(st.integers(0, 2**32))).double() * scale
    special = st.sampled_from([0.0, -0.0, 1e-45, -1e-40, MIN_SCALE, 1.0, -3e4, 1e20, -2.5e38])
    for place in draw(st.lists(st.integers(0, rows * features - 1), max_size=5)):
        numbers.view(-1)[place] = draw(special)
    return numbers.float()


@given(codecs, tensors())
@settings(deadline=None)
def test_errors_are_at_most_half_a_step(codec: str, tensor: torch.Tensor) -> None:
    encoded = encode(tensor, codec)
    numbers, scales = read(codec, *encoded.shape, bytes(encoded.data))
    result = received(encoded)
    assert torch.equal(result.double(), numbers)  # no further rounding in float32
    exact = tensor.double()
    assert ((numbers - exact).abs() <= half_steps(codec, exact, scales)).all()
    assert (numbers[exact == 0] == 0).all()
    # Scales are no larger than needed.
    spec = SPECS[codec]
    top = 448 if codec == "fp8" else 2 ** (spec.bits - 1) - 1
    for start in range(0, tensor.shape[1], spec.group):
        largest = exact[:, start : start + spec.group].abs().amax(dim=1)
        needed = (largest / top).clamp_min(MIN_SCALE)
        assert (scales[:, start] <= needed * (1 + 2**-7)).all()
        assert (scales[:, start] >= needed * (1 - 2**-23)).all()


@given(codecs, st.integers(1, 3), st.integers(1, 300), st.data())
@settings(deadline=None)
def test_any_bytes_are_read_as_specified(
    codec: str, rows: int, features: int, data: st.DataObject
) -> None:
    spec = SPECS[codec]
    random = data.draw(st.randoms(use_true_random=False))
    num_scales = rows * math.ceil(features / spec.group)
    scales = [random.randint(0, spec.max_scale) for _ in range(num_scales)]
    payload = bytearray(random.randbytes(spec.nbytes(rows, features)))
    struct.pack_into(f"<{num_scales}H", payload, 0, *scales)
    expected, _ = read(codec, rows, features, bytes(payload))
    if expected.isnan().any():
        with pytest.raises(RemoteProtocolError, match="fp8 has a code that stands for NaN"):
            decode(codec, (rows, features), payload, device=CPU, dtype=torch.float32)
        return
    result = decode(codec, (rows, features), payload, device=CPU, dtype=torch.float32)
    assert result.isfinite().all()
    torch.testing.assert_close(result.double(), expected, rtol=2**-24, atol=2**-149)


@each_codec
def test_the_limits_of_scales(codec: str) -> None:
    spec = SPECS[codec]
    payload = bytearray(spec.nbytes(1, spec.group))
    for scale in (0, 1, spec.max_scale):
        struct.pack_into("<H", payload, 0, scale)
        result = decode(codec, (1, spec.group), payload, device=CPU, dtype=torch.float32)
        assert result.isfinite().all()
    infinity, nan, negative_zero = 0x7F80, 0x7FC0, 0x8000
    for scale in (spec.max_scale + 1, infinity, nan, negative_zero, 0xBF80, 0xFFFF):
        struct.pack_into("<H", payload, 0, scale)
        with pytest.raises(RemoteProtocolError, match=f"in {codec} has a scale that is negative"):
            decode(codec, (1, spec.group), payload, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_of_nan(code: int) -> None:
    payload = bytearray(encode(torch.ones(1, 4), "fp8").data)
    payload[-1] = code
    with pytest.raises(RemoteProtocolError, match="fp8 has a code that stands for NaN"):
        decode("fp8", (1, 4), payload, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("codec", INTEGERS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-126, 2.0**-60, 2.0**100, 1.0078125])
def test_every_integer_survives(codec: str, scale: float) -> None:
    top = 2 ** (SPECS[codec].bits - 1) - 1
    tensor = torch.arange(-top, top + 1.0).view(-1, 1).expand(-1, 40).clone()
    tensor[:, ::32] = top  # in each of the groups
    tensor *= scale
    assert torch.equal(received(encode(tensor, codec)), tensor)


def test_every_number_of_fp8_survives() -> None:
    values = [value_of("fp8", code) for code in range(256) if code & 0x7F != 0x7F]
    tensor = torch.tensor([values]).view(-1, 1).expand(-1, 130).clone()
    tensor[:, ::128] = 448
    result = received(encode(tensor, "fp8"))
    assert torch.equal(result, tensor)
    assert torch.equal(result.signbit(), tensor.signbit())


@each_codec
@each_dtype
def test_zeros(codec: str, dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 300, dtype=dtype)
    tensor[1, :200] = 1  # groups of zeros beside others, and some of both
    result = received(encode(tensor, codec), dtype)
    assert torch.equal(result == 0, tensor == 0)


@each_codec
def test_tiny_numbers(codec: str) -> None:
    subnormal = torch.tensor([[2.0**-149, -(2.0**-140), 2.0**-127, 0.0]])
    result = received(encode(subnormal, codec))
    assert ((result - subnormal).abs() <= MIN_SCALE / 2).all()
    small = random_tensor(1, 300) * 1e-30
    result = received(encode(small, codec))
    torch.testing.assert_close(result, received(encode(small * 2**60, codec)) * 2**-60)


@each_codec
def test_the_largest_numbers(codec: str) -> None:
    spec = SPECS[codec]
    top = 448 if codec == "fp8" else 2 ** (spec.bits - 1) - 1
    scale = struct.unpack("<f", struct.pack("<I", spec.max_scale << 16))[0]
    largest = torch.tensor([[1.0, -top * scale, 0.0]])
    result = received(encode(largest, codec))
    assert torch.equal(result[0, 1:], largest[0, 1:])
    assert top * scale > 0.86 * FLOAT32_MAX


BAD_VALUES = {
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "nan": math.nan,
    "float32's largest": FLOAT32_MAX,
    "beyond float32": 1e300,
}


@each_codec
@each_dtype
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_what_cannot_be_carried(codec: str, dtype: torch.dtype, bad: str) -> None:
    for place in (0, 130, 299):
        tensor = torch.ones(2, 300, dtype=dtype)
        tensor[1, place] = (
            BAD_VALUES[bad]
            if dtype == torch.float64
            else float(torch.tensor(BAD_VALUES[bad], dtype=torch.float64).to(dtype))
        )
        with pytest.raises(
            ConfigError, match=rf"codec {codec} cannot carry .*e\+38: use fp16, bf16 or fp32"
        ):
            encode(tensor, codec)


@each_codec
def test_any_nan_is_noticed(codec: str) -> None:
    """Signalling ones and negative ones too."""
    for pattern in (0x7F800001, 0x7FFFFFFF, 0x7FC00000, -0x7FFFFF, -1, -0x400000):
        tensor = torch.ones(1, 64)
        tensor.view(torch.int32)[0, 5] = pattern
        assert tensor[0, 5].isnan()
        with pytest.raises(ConfigError):
            encode(tensor, codec)


@each_codec
def test_an_outlier_costs_its_group_only(codec: str) -> None:
    group = SPECS[codec].group
    tensor = random_tensor(2, 4 * group)
    expected = received(encode(tensor, codec))
    tensor[0, group] = 1e6
    result = received(encode(tensor, codec))
    others = torch.ones_like(tensor, dtype=torch.bool)
    others[0, group : 2 * group] = False
    assert torch.equal(result[others], expected[others])


@each_codec
def test_the_bytes_belong_to_nobody_else(codec: str) -> None:
    for dtype in DTYPES:
        tensor = torch.ones(2, 64, dtype=dtype)
        encoded = encode(tensor, codec)
        before = bytes(encoded.data)
        tensor.zero_()
        assert encoded.data == before
    encoded = encode(random_tensor(2, 64), codec)
    frame = memoryview(bytearray(encoded.data))
    result = decode(codec, (2, 64), frame, device=CPU, dtype=torch.float32)
    assert not 0 <= result.data_ptr() - address_of(frame) < frame.nbytes
    expected = result.clone()
    frame[:] = bytes(frame.nbytes)
    assert torch.equal(result, expected)


@each_codec
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_frames_need_no_alignment(codec: str, offset: int) -> None:
    encoded = encode(random_tensor(3, 100), codec)
    frame = memoryview(bytearray(offset) + encoded.data)
    result = decode(codec, (3, 100), frame[offset:], device=CPU, dtype=torch.float32)
    assert torch.equal(result, received(encoded))
