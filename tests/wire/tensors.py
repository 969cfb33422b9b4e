"""Helpers for the tests of payload codecs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privatelora.runtime.payload.codec import EncodedTensor, decode

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def received(encoded: EncodedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What comes out at the other end of a transport, which delivers memory of its own."""
    frame = memoryview(bytearray(encoded.data))
    return decode(encoded.codec, encoded.shape, frame, device=CPU, dtype=dtype)


def random_tensor(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def address_of(data: memoryview) -> int:
    return int(np.frombuffer(data, dtype=np.uint8).ctypes.data)
