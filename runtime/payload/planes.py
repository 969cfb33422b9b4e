"""Unsigned integers of a few bits, packed without gaps.

An integer of 6 bits is stored as its lower 4 and its upper 2: each of these planes fills bytes
evenly. In a plane of ``width`` bits a row of n numbers takes w = ceil(n * width / 8) bytes.
Byte j holds numbers j, w + j, 2w + j and so on, the first in its lowest bits, and zeros beyond
the end of the row. (Neighbours in one byte would be simpler to say, but slower to pack.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.integer[Any]]
"""Of uint8, or uint16 for more than 8 bits."""

# As arrays, which numpy combines with arrays faster than it does numbers of Python.
_SHIFTS = {width: np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1) for width in (2, 4)}
_MASKS = {width: np.array((1 << width) - 1, dtype=np.uint8) for width in (2, 4)}


def row_nbytes(features: int, width: int) -> int:
    """Bytes of a row in a plane of ``width`` bits."""
    return -(-features * width // 8)


def pack(codes: Codes, widths: Sequence[int]) -> list[Bytes]:
    """Planes (rows, row_nbytes), lowest bits first, of codes (rows, features).

    ``widths``: bits of each plane, 2, 4 or 8; a code is below 2 ** sum(widths).
    """
    planes = []
    shift = 0
    for width in widths:
        plane = (codes >> shift if shift else codes).astype(np.uint8, copy=False)
        planes.append(plane if width == 8 else _pack_plane(plane, width))
        shift += width
    return planes


def unpack(data: Bytes, rows: int, features: int, widths: Sequence[int]) -> Codes:
    """Codes (rows, features) out of the bytes of all planes, which they may share."""
    pieces: list[Codes] = []
    shift = start = 0
    for width in widths:
        stop = start + rows * row_nbytes(features, width)
        packed = data[start:stop].reshape(rows, -1)
        plane = packed if width == 8 else _unpack_plane(packed, features, width)
        pieces.append(plane.astype(np.uint16) << shift if shift else plane)
        shift, start = shift + width, stop
    codes: Codes = reduce(np.bitwise_or, pieces)
    return codes


def _pack_plane(plane: Bytes, width: int) -> Bytes:
    """Pack the lowest ``width`` bits of each number."""
    rows, features = plane.shape
    count, nbytes = 8 // width, row_nbytes(features, width)
    lowest = plane & _MASKS[width]
    if count * nbytes > features:
        lowest = np.pad(lowest, ((0, 0), (0, count * nbytes - features)))
    shifted = lowest.reshape(rows, count, nbytes) << _SHIFTS[width]
    packed: Bytes = np.bitwise_or.reduce(shifted, axis=1)
    return packed


def _unpack_plane(packed: Bytes, features: int, width: int) -> Bytes:
    shifted = packed[:, np.newaxis] >> _SHIFTS[width]
    shifted &= _MASKS[width]
    return shifted.reshape(len(packed), -1)[:, :features]
