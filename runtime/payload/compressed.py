"""Lossless compression on top of another codec."""

from __future__ import annotations

from collections.abc import Callable

import lz4.block
import numpy as np
import torch

from privatelora.errors import RemoteProtocolError
from privatelora.runtime.payload.base import PayloadCodec
from privatelora.runtime.payload.names import LZ4_SUFFIX

# lz4 ships without annotations.
_compress: Callable[..., bytes] = lz4.block.compress  # type: ignore[attr-defined]
_decompress: Callable[..., bytearray] = lz4.block.decompress  # type: ignore[attr-defined]
_Error: type[Exception] = lz4.block.LZ4BlockError  # type: ignore[attr-defined]

_MAX_BLOCK_NBYTES = 0x7E000000
"""Most that one LZ4 block can hold, by the format's reference implementation."""
_MAX_RATIO = 255
"""No byte of an LZ4 block stands for more bytes than this."""


class Lz4Codec(PayloadCodec):
    """The bytes of ``inner`` as one LZ4 block, wherever that is smaller.

    A payload of exactly the plain size is that of ``inner``, a smaller one is compressed. What is
    compressed are planes: the most significant bytes of all numbers first, because those are
    alike, down to the least significant. Trying in vain costs about a microsecond for a row.
    """

    def __init__(self, inner: PayloadCodec) -> None:
        self.name = inner.name + LZ4_SUFFIX
        self.number_nbytes = inner.number_nbytes
        self._inner = inner

    def nbytes(self, rows: int, features: int) -> int:
        """Size of the tensor in the inner codec."""
        return self._inner.nbytes(rows, features)

    def accepts(self, nbytes: int, rows: int, features: int) -> bool:
        """The plain size, or one from which a block can grow to it."""
        plain = self.nbytes(rows, features)
        return nbytes == plain or nbytes < plain <= min(nbytes * _MAX_RATIO, _MAX_BLOCK_NBYTES)

    def encode(self, tensor: torch.Tensor) -> memoryview:
        """Bytes of a tensor; ConfigError as the inner codec."""
        plain = self._inner.encode(tensor)
        if plain.nbytes > _MAX_BLOCK_NBYTES:
            return plain
        compressed = _compress(self._split(plain), store_size=False)
        return memoryview(compressed) if len(compressed) < plain.nbytes else plain

    def decode(
        self,
        data: memoryview,
        rows: int,
        features: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Tensor (rows, features)."""
        plain = self.nbytes(rows, features)
        if data.nbytes < plain:
            data = self._join(self._decompress(data, plain))
        return self._inner.decode(data, rows, features, device, dtype)

    def _decompress(self, data: memoryview, nbytes: int) -> bytearray:
        try:
            planes = _decompress(data, uncompressed_size=nbytes, return_bytearray=True)
        except _Error as error:
            raise RemoteProtocolError(
                f"a tensor in {self.name} is no LZ4 block of {nbytes} bytes: {error}"
            ) from error
        if len(planes) != nbytes:
            raise RemoteProtocolError(
                f"a tensor in {self.name} came as an LZ4 block of {len(planes)} bytes; it takes "
                f"{nbytes}"
            )
        return planes

    def _split(self, plain: memoryview) -> memoryview:
        if self.number_nbytes == 1:
            return plain
        numbers = np.frombuffer(plain, dtype=np.uint8).reshape(-1, self.number_nbytes)
        return np.ascontiguousarray(numbers[:, ::-1].T).data.cast("B")

    def _join(self, planes: bytearray) -> memoryview:
        if self.number_nbytes == 1:
            return memoryview(planes)
        numbers = np.frombuffer(planes, dtype=np.uint8).reshape(self.number_nbytes, -1)
        return np.ascontiguousarray(numbers[::-1].T).data.cast("B")
