"""Where and in what precision to compute, from what a person wrote."""

from __future__ import annotations

import re

import torch

from privatelora.errors import ConfigError
from privatelora.runtime.config import DEVICE_PATTERN, DtypeName


def compute_dtype(name: DtypeName, stored: str) -> torch.dtype:
    """The dtype to compute in, given the one the shard is stored in."""
    dtype = getattr(torch, stored if name == "auto" else name)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{name} is no dtype")
    return dtype


def compute_device(name: str) -> torch.device:
    """The device to compute on; ConfigError if there is no such device, at all or here."""
    if not re.fullmatch(DEVICE_PATTERN, name):
        raise ConfigError(f"device {name!r}: choose cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {name}: no CUDA device is available here; use cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ConfigError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device
