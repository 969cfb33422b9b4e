"""Rotary position embedding (Su et al., arXiv 2104.09864), with long-context scaling."""

from __future__ import annotations

import math

import torch

from privatelora.partition.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angular frequency of each rotated pair: (head_dim / 2,) float32, radians per position.

    ``llama3`` follows Llama 3.1: wavelengths longer than
    ``original_max_positions / low_freq_factor`` are slowed by ``factor``, those shorter than
    ``original_max_positions / high_freq_factor`` kept, and those between interpolated.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_positions * frequencies / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * frequencies / rope.factor + kept * frequencies
    return frequencies


def rotary(
    frequencies: torch.Tensor, position: int, num_positions: int, dtype: torch.dtype
) -> torch.Tensor:
    """Cosines and signed sines of ``num_positions`` positions from ``position`` on.

    (2, num_positions, 1, head_dim), so that those of several steps can be joined along their
    second dimension. See ``apply_rotary_``.
    """
    positions = torch.arange(
        position, position + num_positions, device=frequencies.device, dtype=torch.float32
    )
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos(), angles.sin()
    halves = torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))
    return halves.to(dtype).unsqueeze(2)


def apply_rotary_(heads: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Rotate (n, num_heads, head_dim) in place by their positions.

    Rolling by half a head and folding the sign of the rotation into the sines gives the
    usual "rotate half" in three operations.
    """
    cos, signed_sin = cos_sin.unbind(0)
    half = heads.shape[-1] // 2
    torch.addcmul(heads * cos, heads.roll(half, -1), signed_sin, out=heads)
