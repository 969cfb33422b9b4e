"""How tokens are chosen and when to stop, as people and programs write it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class SamplingParams(BaseModel):
    """How to choose tokens and when to stop. The defaults are greedy."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0: always the most likely token; the other filters of chance then have no effect."""
    top_k: int = Field(default=0, ge=0)
    """Only so many of the most likely tokens; 0: all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Only the most likely tokens that together have this probability."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Only tokens with at least this share of the most likely one's probability."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    """Divides the logits of tokens that prompt or answer have already; 1: none."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken off the logits of tokens that the answer has already."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken off as often as the answer has them."""
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default={}, max_length=1024
    )
    """Added to the logits of these tokens."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Note how likely each token was, and this many of the most likely."""
    json_schema: dict[str, Any] | None = None
    """The answer is JSON of this schema."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of chance: equal seeds give equal answers. Default: another each time."""
    max_tokens: int = Field(default=512, gt=0)
    """Longest answer."""
    stop: tuple[str, ...] = Field(default=(), max_length=16)
    """The answer ends before any of these."""
    ignore_eos: bool = False
    """Go on to ``max_tokens`` whatever is sampled; for benchmarks."""
