"""Tensors as the messages carry them."""

from __future__ import annotations

import torch

from privatelora.runtime.payload import codec as payload
from privatelora.runtime.wire.messages import TensorPayload


def pack(tensor: torch.Tensor, codec: str) -> TensorPayload:
    """Write (rows, features) with ``codec``."""
    encoded = payload.encode(tensor, codec)
    return TensorPayload(encoded.codec, encoded.shape, encoded.data)


def unpack(message: TensorPayload, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Read (rows, features); RemoteProtocolError if the bytes do not fit the shape."""
    return payload.decode(message.codec, message.shape, message.data, device=device, dtype=dtype)
