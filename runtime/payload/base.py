"""The contract a payload codec keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class PayloadCodec(ABC):
    """One way to write a tensor (rows, features) as bytes.

    Its plain size follows from the shape alone, and only a codec that compresses may write
    fewer bytes. So a receiver can refuse a payload before it allocates anything for it. It
    should have compared the shape with the one that is due: a small payload may rightly be a
    tensor 255 times its size. Empty tensors never get here.
    """

    name: str
    number_nbytes: int = 1
    """Bytes of a number if each is written whole; 1 if the bytes lie in planes already."""

    @abstractmethod
    def nbytes(self, rows: int, features: int) -> int:
        """Plain size of an encoded tensor of this shape: the largest it can have."""

    def accepts(self, nbytes: int, rows: int, features: int) -> bool:
        """Whether ``nbytes`` can be the size of an encoded tensor of this shape."""
        return nbytes == self.nbytes(rows, features)

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
        """Tensor (rows, features) out of as many bytes as ``accepts`` allows.

        Raises RemoteProtocolError for bytes that stand for no such tensor.
        """
