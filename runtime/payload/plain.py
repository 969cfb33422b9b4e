"""Codecs that write the numbers as they are: little-endian, row-major, without gaps."""

from __future__ import annotations

import math

import torch

from privatelora.errors import ConfigError
from privatelora.runtime.payload.base import PayloadCodec

_CPU = torch.device("cpu")


class PlainCodec(PayloadCodec):
    """Every number in one floating-point format. NaN and infinities survive."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.number_nbytes = dtype.itemsize
        self._dtype = dtype
        self._max = torch.finfo(dtype).max

    def nbytes(self, rows: int, features: int) -> int:
        """Size of an encoded tensor of this shape."""
        return rows * features * self.number_nbytes

    def encode(self, tensor: torch.Tensor) -> memoryview:
        """Bytes of a tensor, without a copy if it is contiguous, on a CPU and of this format.

        Raises ConfigError if a finite value would become infinite in fp16.
        """
        tensor = tensor.detach()
        encoded = tensor.to(_CPU, self._dtype).contiguous()
        if self._dtype is torch.float16:
            if tensor.dtype is not torch.float16:
                self._check_range(tensor, encoded)
        elif self._dtype is torch.bfloat16:
            encoded = encoded.view(torch.int16)  # numpy has no bfloat16
        return encoded.numpy().data.cast("B")

    def decode(
        self,
        data: memoryview,
        rows: int,
        features: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Tensor (rows, features).

        It is the memory of ``data`` itself, if that is writable and neither device nor dtype
        have to change.
        """
        # torch has no read-only tensors.
        buffer = bytearray(data) if data.readonly else data
        tensor = torch.frombuffer(buffer, dtype=self._dtype).view(rows, features)
        return tensor.to(device, dtype)

    def _check_range(self, tensor: torch.Tensor, encoded: torch.Tensor) -> None:
        # One cheap pass for the usual case. Infinities and NaN that were there before are fine.
        low, high = encoded.aminmax()
        if math.isfinite(high.item() - low.item()):
            return
        lost = encoded.isinf() & tensor.isfinite().to(_CPU)
        if lost.any():
            value = tensor.to(_CPU)[lost][0].item()
            raise ConfigError(
                f"the payload codec {self.name} cannot carry the value {value:g} (at most "
                f"{self._max:g}): use bf16 or fp32"
            )


PLAIN_CODECS = (
    PlainCodec("fp16", torch.float16),
    PlainCodec("bf16", torch.bfloat16),
    PlainCodec("fp32", torch.float32),
)
