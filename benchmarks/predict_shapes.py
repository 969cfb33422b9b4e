"""The sizes of a decoder that a prediction needs, from a checkpoint or by the name of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from privatelora.partition.models.config import DecoderConfig, RopeConfig
from privatelora.partition.plan import TARGETS, Plan
from privatelora.partition.plan_file import make_plan

DEFAULT_RANK = 128


@dataclass(frozen=True)
class ModelShape:
    """A decoder and what a weight of it takes.

    ``weight_nbytes``: bytes of one weight in the memory that computes with it: 2 for bfloat16, 0.5
    for 4 bits. Norms and biases are left out of all counts: they are below a thousandth.
    """

    name: str
    config: DecoderConfig
    weight_nbytes: float = 2.0

    @property
    def qkv_weights(self) -> int:
        """Weights of one layer's q, k and v projections."""
        config = self.config
        return config.hidden_size * sum(config.projection_size(target) for target in TARGETS)

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer: attention, and the three matrices of the feed-forward."""
        config = self.config
        output = config.projection_size("q") * config.hidden_size
        return self.qkv_weights + output + 3 * config.hidden_size * config.intermediate_size

    @property
    def head_weights(self) -> int:
        """Weights of the LM head."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def kv_size(self) -> int:
        """Numbers that one layer caches for one position."""
        return 2 * self.config.projection_size("k")

    @property
    def token_nbytes(self) -> float:
        """Bytes of all weights that decoding one token reads."""
        return (self.config.num_layers * self.layer_weights + self.head_weights) * (
            self.weight_nbytes
        )

    def plan(
        self,
        every: int | Literal["all"] = 1,
        rank_up: int | None = None,
        rank_down: int | None = None,
    ) -> Plan:
        """An arrangement of all layers; no rank: 128, or as much as the model has room for.

        Raises PartitionError for what the model does not have.
        """
        config = self.config
        most_down = min(config.projection_size(target) for target in TARGETS)
        return make_plan(
            config,
            every=every,
            rank_up=rank_up or min(DEFAULT_RANK, config.hidden_size),
            rank_down=rank_down or min(DEFAULT_RANK, most_down),
        )


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        vocab_size=32_000,
        max_positions=4096,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
    )


_NAMED = {
    "llama-2-7b": _llama(4096, 11_008, 32, 32),
    "llama-2-13b": _llama(5120, 13_824, 40, 40),
    # Llama 2 was never published in this size; the paper's 30B is that of the first Llama.
    "llama-30b": _llama(6656, 17_920, 60, 52),
}
SHAPE_NAMES: Sequence[str] = tuple(_NAMED)
"""Models whose sizes are known without a file."""


def named_shape(name: str, weight_nbytes: float = 2.0) -> ModelShape | None:
    """The shape of a published model, such as ``llama-2-7b`` or just ``7b``; None if unknown."""
    for full, config in _NAMED.items():
        if name.lower() in (full, full.rpartition("-")[2]):
            return ModelShape(full, config, weight_nbytes)
    return None
