"""From what a request says to how tokens are chosen."""

from __future__ import annotations

from typing import Any

from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.http.errors import ApiError
from privatelora.runtime.http.schemas import GenerationRequest
from privatelora.runtime.sampling_params import SamplingParams

SAME_NAMES = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)
NUM_SEEDS = 2**63


def sampling_params(
    service: EdgeService,
    request: GenerationRequest,
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """The edge's defaults with what the request sets. Raises ApiError or RequestError."""
    wanted: dict[str, Any] = {name: getattr(request, name) for name in SAME_NAMES}
    wanted["max_tokens"] = max_tokens
    wanted["logprobs"] = logprobs
    if request.top_k is not None:
        wanted["top_k"] = max(request.top_k, 0)  # for some clients -1 means all
    if request.seed is not None:
        wanted["seed"] = request.seed % NUM_SEEDS
    if request.stop is not None:
        wanted["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.logit_bias is not None:
        wanted["logit_bias"] = _biases(request.logit_bias)
    if request.response_format is not None:
        wanted["json_schema"] = request.response_format.answer_schema
    return service.params({name: value for name, value in wanted.items() if value is not None})


def for_choice(params: SamplingParams, number: int) -> SamplingParams:
    """Parameters of one of several answers to a prompt: each has a seed of its own."""
    if params.seed is None or number == 0:
        return params
    return params.model_copy(update={"seed": (params.seed + number) % NUM_SEEDS})


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token_id): bias for token_id, bias in given.items()}
    except ValueError as error:
        raise ApiError(
            "logit_bias: keys must be token ids", param="logit_bias", code="invalid_value"
        ) from error
