"""Tensors to bytes and back, by the name of a codec.

    fp16   IEEE 754 binary16
    bf16   bfloat16
    fp32   IEEE 754 binary32

Shapes are (rows, features). Everything else that a codec may be is its own affair, behind
``PayloadCodec``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from privatelora.errors import ConfigError, RemoteProtocolError
from privatelora.runtime.payload.base import PayloadCodec
from privatelora.runtime.payload.plain import PLAIN_CODECS

_CODECS: dict[str, PayloadCodec] = {codec.name: codec for codec in PLAIN_CODECS}

CODEC_NAMES: tuple[str, ...] = tuple(_CODECS)
"""Codecs that this installation can encode and decode, smallest first."""


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """A tensor (rows, features) as bytes.

    ``data`` may be the tensor's own memory: do not change the tensor before it was sent.
    """

    codec: str
    shape: tuple[int, int]
    data: memoryview


def encode(tensor: torch.Tensor, codec: str) -> EncodedTensor:
    """Write a tensor (rows, features) of any float dtype, on any device.

    Raises ConfigError if there is no such codec, or if it cannot carry a value.
    """
    found = _CODECS.get(codec)
    if found is None:
        raise ConfigError(
            f"there is no payload codec {codec!r}: choose one of {', '.join(CODEC_NAMES)}"
        )
    rows, features = tensor.shape
    data = found.encode(tensor) if rows and features else memoryview(b"")
    return EncodedTensor(codec, (rows, features), data)


def decode(
    codec: str,
    shape: tuple[int, int],
    data: bytes | bytearray | memoryview,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Read a tensor (rows, features) from a peer's bytes.

    The tensor may be the memory of ``data`` and keeps it alive. Raises RemoteProtocolError,
    before anything is allocated, if there is no such codec or the size is not exactly that of
    the shape.
    """
    found = _CODECS.get(codec)
    if found is None:
        raise RemoteProtocolError(
            f"a tensor came in the payload codec {codec!r}, which this end does not offer; it "
            f"offers {', '.join(CODEC_NAMES)}"
        )
    rows, features = shape
    view = memoryview(data)
    if rows < 0 or features < 0 or view.nbytes != found.nbytes(rows, features):
        raise RemoteProtocolError(
            f"a tensor of {rows} x {features} in {codec} came as {view.nbytes} bytes; it takes "
            f"{found.nbytes(rows, features)}"
        )
    if not view.nbytes:
        return torch.empty((rows, features), device=device, dtype=dtype)
    return found.decode(view, rows, features, device, dtype)
