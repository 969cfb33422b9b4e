"""What the engine needs to know of a decoder, whatever file it came from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MAX = 2**31 - 1

Count = Annotated[int, Field(gt=0, le=_MAX)]
"""A size. Files may hold numbers of thousands of digits, with which arithmetic overflows."""
TokenId = Annotated[int, Field(ge=-_MAX, le=_MAX)]
"""Published files also say -1, for none."""


class RopeConfig(BaseModel):
    """Rotary position embedding: base frequency and optional long-context scaling.

    ``kind`` is Hugging Face's ``rope_type``. ``linear`` divides positions by ``factor``;
    ``llama3`` is the frequency-dependent scaling of Llama 3.1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = Field(gt=0, allow_inf_nan=False)
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    low_freq_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    high_freq_factor: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    original_max_positions: Count = 8192


class DecoderConfig(BaseModel):
    """Shape and variations of one Llama-like decoder.

    Every family this project supports is this class with other values; a family whose
    layers compute something else needs a new field here and its branch in the decoder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    vocab_size: Count
    max_positions: Count
    rms_norm_eps: float = Field(gt=0, allow_inf_nan=False)
    rope: RopeConfig
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: Count | None = None
    sliding_layers: tuple[int, ...] = ()
    """Layers that attend only to the last ``sliding_window`` positions (their own included)."""
    bos_token_id: TokenId | None = None
    eos_token_ids: tuple[TokenId, ...] = ()

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
