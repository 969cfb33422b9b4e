"""What a response says about its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from privatelora.runtime.figures import figures
from privatelora.runtime.http.answers import Answer


def usage(answers: Sequence[Answer], num_choices: int) -> dict[str, Any]:
    """Tokens of a request so far. ``num_choices`` answers in a row share a prompt."""
    prompts = answers[::num_choices]
    prompt_tokens = sum(len(answer.prompt_ids) for answer in prompts)
    completion_tokens = sum(answer.stats.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(answer.stats.cached_tokens for answer in prompts)
        },
    }


def cost(answers: Sequence[Answer], num_choices: int) -> dict[str, Any]:
    """``usage``, and this edge's own figures of the first answer beside it."""
    return {
        "usage": usage(answers, num_choices),
        "privatelora": figures(answers[0].stats),
    }
