"""The contract a payload codec keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class PayloadCodec(ABC):
    """One way to write a tensor (rows, features) as bytes.

    The number of bytes follows from the shape alone, so a receiver can refuse a payload
    before it allocates anything for it. Empty tensors never get here.
    """

    name: str

    @abstractmethod
    def nbytes(self, rows: int, features: int) -> int:
        """Size of an encoded tensor of this shape."""

    @abstractmethod
    def encode(self, tensor: torch.Tensor) -> memoryview:
        """Bytes of a tensor of any float dtype on any device.

        Raises ConfigError for values this codec cannot carry.
        """

    @abstractmethod
    def decode(
        self,
        data: memoryview,
        rows: int,
        features: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Tensor (rows, features) out of ``nbytes(rows, features)`` bytes.

        Raises RemoteProtocolError for bytes that this codec never writes.
        """
