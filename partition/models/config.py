"""What the engine needs to know of a decoder, whatever file it came from."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class RopeConfig(BaseModel):
    """Rotary position embedding: base frequency and optional long-context scaling.

    ``kind`` is Hugging Face's ``rope_type``. ``linear`` divides positions by ``factor``;
    ``llama3`` is the frequency-dependent scaling of Llama 3.1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = Field(gt=0)
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = Field(default=1.0, gt=0)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_max_positions: PositiveInt = 8192


class DecoderConfig(BaseModel):
    """Shape and variations of one Llama-like decoder.

    Every family this project supports is this class with other values; a family whose
    layers compute something else needs a new field here and its branch in the decoder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    max_positions: PositiveInt
    rms_norm_eps: float = Field(gt=0)
    rope: RopeConfig
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: PositiveInt | None = None
    sliding_layers: tuple[int, ...] = ()
    """Layers that attend only to the last ``sliding_window`` positions (their own included)."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> DecoderConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) is not a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary embedding")
        if self.sliding_layers and self.sliding_window is None:
            raise ValueError("sliding_layers needs sliding_window")
        return self

    def projection_size(self, target: str) -> int:
        """Output features of the ``q``, ``k`` or ``v`` projection."""
        heads = self.num_heads if target == "q" else self.num_kv_heads
        return heads * self.head_dim
