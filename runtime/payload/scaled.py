"""Codecs that write small numbers and, for every group of them, a scale.

A row is cut into groups of neighbours, the last of which may be shorter. The largest magnitude
of a group gives its scale, so one outlier costs only its group precision, and no number depends
on another row. Bytes: the scales (rows, groups), each the upper 16 bits of a float32 (bfloat16),
then the codes (rows, features) in the planes of ``planes.py``. A number is scale * value(code).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from privatelora.errors import ConfigError, RemoteProtocolError
from privatelora.runtime.payload import planes
from privatelora.runtime.payload.base import PayloadCodec
from privatelora.runtime.payload.planes import Bytes, Codes

Floats = npt.NDArray[np.float32]

_MAX = np.finfo(np.float32).max
_MIN_SCALE = np.float32(2.0**-126)
"""Smallest scale written, so that its reciprocal is finite too. Numbers below half of it turn
into zero."""


class CodeFormat(ABC):
    """The values that a code of a few bits can stand for."""

    widths: Sequence[int]
    """Bits of a code, by plane."""
    top: np.float32
    """The scale maps a group's largest magnitude to at most this."""
    reach: np.float32
    """No code stands for a larger magnitude."""

    @abstractmethod
    def codes(self, values: Floats) -> Codes:
        """Nearest codes of values within +-top, which may be overwritten."""

    @abstractmethod
    def values(self, codes: Codes) -> Floats:
        """Values of codes, in memory of their own; RemoteProtocolError if one has none."""


class IntegerFormat(CodeFormat):
    """Integers from -top to top, written as code = integer + 2 ** (bits - 1)."""

    def __init__(self, *widths: int) -> None:
        self.widths = widths
        bits = sum(widths)
        self.reach = np.float32(2 ** (bits - 1))
        self.top = np.float32(2 ** (bits - 1) - 1)
        self._dtype = np.dtype(np.uint8 if bits <= 8 else np.uint16)

    def codes(self, values: Floats) -> Codes:
        """Round half to even."""
        np.rint(values, out=values)
        values += self.reach
        return values.astype(self._dtype)

    def values(self, codes: Codes) -> Floats:
        """Integers, as float32."""
        values = codes.astype(np.float32)
        values -= self.reach
        return values


class Float8Format(CodeFormat):
    """The E4M3 of arXiv 2209.05433: sign, 4 bits of exponent, 3 of mantissa, no infinities."""

    widths = (8,)
    top = reach = np.float32(torch.finfo(torch.float8_e4m3fn).max)

    def __init__(self) -> None:
        all_codes = torch.arange(256, dtype=torch.uint8)
        self._table: Floats = all_codes.view(torch.float8_e4m3fn).to(torch.float32).numpy()

    def codes(self, values: Floats) -> Codes:
        """Round half to even."""
        codes: Bytes = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return codes

    def values(self, codes: Codes) -> Floats:
        """By table: faster than torch's conversion."""
        values: Floats = self._table.take(codes)
        if np.isnan(values).any():
            raise RemoteProtocolError("a tensor in fp8 has a code that stands for NaN")
        return values


class ScaledCodec(PayloadCodec):
    """Groups of ``group`` numbers of a row in ``code_format``, with a scale each.

    A number comes back within half the distance of the code's neighbours, times the scale: for
    integers half a scale. Zero comes back as zero. Every decoded number is finite in float32.
    """

    def __init__(self, name: str, code_format: CodeFormat, group: int) -> None:
        self.name = name
        self._format = code_format
        self._group = group
        # The largest bfloat16 with which no code exceeds float32.
        self._max_scale_bits = int((_MAX / code_format.reach).view(np.uint32)) >> 16
        self._max_scale = np.uint32(self._max_scale_bits << 16).view(np.float32)

    def nbytes(self, rows: int, features: int) -> int:
        """Size of an encoded tensor of this shape."""
        codes = sum(planes.row_nbytes(features, width) for width in self._format.widths)
        return rows * (2 * -(-features // self._group) + codes)

    def encode(self, tensor: torch.Tensor) -> memoryview:
        """Bytes of a tensor; ConfigError if it has a number too large, an infinity or NaN."""
        # In this order, because fewer bytes leave a GPU in a smaller dtype.
        numbers: Floats = tensor.detach().cpu().float().contiguous().numpy()
        starts = np.arange(0, numbers.shape[1], self._group)
        exact = np.maximum.reduceat(np.abs(numbers), starts, axis=1) / self._format.top
        if not exact.max() <= self._max_scale:  # also for NaN
            raise ConfigError(
                f"the payload codec {self.name} cannot carry infinities, NaN and numbers beyond "
                f"{self._max_scale * self._format.top:.2e}: use fp16, bf16 or fp32"
            )
        # Rounded up to bfloat16: rounded down, the largest number would have no code.
        bits = np.maximum(exact, _MIN_SCALE).view(np.uint32) + 0xFFFF
        bits >>= 16
        scales = (bits << 16).view(np.float32)
        codes = self._format.codes(numbers * self._spread(np.reciprocal(scales), numbers.shape[1]))
        packed = planes.pack(codes, self._format.widths)
        return memoryview(b"".join([bits.astype("<u2").data, *[plane.data for plane in packed]]))

    def decode(
        self,
        data: memoryview,
        rows: int,
        features: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Tensor (rows, features), in memory of its own."""
        groups = -(-features // self._group)
        bits = np.frombuffer(data, dtype="<u2", count=rows * groups).reshape(rows, groups)
        if bits.max() > self._max_scale_bits:  # negative scales too
            raise RemoteProtocolError(
                f"a tensor in {self.name} has a scale that is negative, too large or NaN"
            )
        scales = (bits.astype(np.uint32) << 16).view(np.float32)
        codes = np.frombuffer(data, dtype=np.uint8, offset=bits.nbytes)
        values = self._format.values(planes.unpack(codes, rows, features, self._format.widths))
        values *= self._spread(scales, features)
        return torch.from_numpy(values).to(device, dtype)

    def _spread(self, scales: Floats, features: int) -> Floats:
        """One per group (rows, groups) to one per number (rows, features)."""
        return scales.repeat(self._group, axis=1)[:, :features]


SCALED_CODECS = (
    ScaledCodec("int12", IntegerFormat(8, 4), group=32),
    ScaledCodec("int10", IntegerFormat(8, 2), group=32),
    ScaledCodec("fp8", Float8Format(), group=128),
    ScaledCodec("int8", IntegerFormat(8), group=32),
    ScaledCodec("int6", IntegerFormat(4, 2), group=32),
    ScaledCodec("int4", IntegerFormat(4), group=32),
)
"""Groups are as long as pays: halving them costs 16 bits for each, and on hidden states and z of
a real model the error falls by less than those bits would bring elsewhere. E4M3 has a range of
its own and needs few scales."""
