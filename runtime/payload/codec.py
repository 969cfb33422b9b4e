"""Tensors to bytes and back, by the name of a codec.

    fp32 fp16 bf16            IEEE 754 binary32 and binary16, and bfloat16
    int12 int10 int8 int6 int4    integers, with a scale for every 32 numbers of a row
    fp8                       E4M3, with a scale for every 128 numbers of a row
    NAME+lz4                  any of these as an LZ4 block, where that is smaller

Shapes are (rows, features). Everything else that a codec may be is its own affair, behind
``PayloadCodec``; docs/PROTOCOL.md says what the bytes are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from privatelora.errors import ConfigError, RemoteProtocolError
from privatelora.runtime.payload.base import PayloadCodec
from privatelora.runtime.payload.compressed import Lz4Codec
from privatelora.runtime.payload.names import CODEC_NAMES as CODEC_NAMES
from privatelora.runtime.payload.plain import PLAIN_CODECS
from privatelora.runtime.payload.scaled import SCALED_CODECS

_UNCOMPRESSED: tuple[PayloadCodec, ...] = (*PLAIN_CODECS, *SCALED_CODECS)
_CODECS = {codec.name: codec for codec in (*_UNCOMPRESSED, *map(Lz4Codec, _UNCOMPRESSED))}


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """A tensor (rows, features) as bytes.

    ``data`` may be the tensor's own memory: do not change the tensor before it was sent.
    """

    codec: str
    shape: tuple[int, int]
    data: memoryview


def plain_nbytes(codec: str, shape: tuple[int, int]) -> int:
    """Bytes of a tensor (rows, features) in a known codec; compressed ones take at most these."""
    return _CODECS[codec].nbytes(*shape)


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

    The tensor may be the memory of ``data`` and keeps it alive. Its size is bounded by that of
    ``data``, if only 255 fold where a codec compresses: compare ``shape`` with the one that is
    due first. Raises RemoteProtocolError: before anything is allocated if there is no such codec
    or the size cannot be that of the shape, and for bytes that stand for no tensor.
    """
    found = _CODECS.get(codec)
    if found is None:
        raise RemoteProtocolError(
            f"a tensor came in the payload codec {codec!r}, which this end does not offer; it "
            f"offers {', '.join(CODEC_NAMES)}"
        )
    rows, features = shape
    view = memoryview(data)
    if rows < 0 or features < 0 or not found.accepts(view.nbytes, rows, features):
        raise RemoteProtocolError(
            f"a tensor of {rows} x {features} in {codec} came as {view.nbytes} bytes; it takes "
            f"{found.nbytes(rows, features)}"
        )
    if not view.nbytes:
        return torch.empty((rows, features), device=device, dtype=dtype)
    return found.decode(view, rows, features, device, dtype)
