"""From settings to general examples and what the base model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from privatelora.errors import ConfigError
from privatelora.training.data.encode import encode_all
from privatelora.training.data.examples import Encoded
from privatelora.training.data.files import read_examples
from privatelora.training.replay import (
    cached_general,
    encode_general,
    prompt_ids,
    read_prompts,
    split_held_out,
)
from privatelora.training.retention import Reference, RetentionConfig, build_reference

PhaseProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and how much there is."""


def _silent(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class GeneralReferences:
    """What is replayed (None: nothing), and what retention is measured on."""

    replay: Reference | None
    held_out: Reference


def prepare_retention(
    model: Any,
    tokenizer: Any,
    config: RetentionConfig,
    *,
    model_fingerprint: str,
    max_positions: int,
    cache: Path,
    progress: PhaseProgress = _silent,
) -> GeneralReferences:
    """Have a model that is still the base answer general prompts, and keep what it makes of them.

    ``max_positions``: the model's context. ``cache``: an existing directory for the answers, where
    another run with the same model and prompts reads them. Raises ConfigError for prompts that
    cannot be used, and PartitionError if the answers cannot be written.
    """
    if config.prompts is not None and config.prompts.suffix == ".jsonl":
        chats = encode_all(read_examples(config.prompts), tokenizer, max_positions=max_positions)
        replay, held_out = _chosen(*split_held_out(chats), config)
    else:
        prompts = _chosen(*read_prompts(config.prompts), config)
        _check_lengths(tokenizer, [*prompts[0], *prompts[1]], config, max_positions)
        replay, held_out = (
            _answered(
                model,
                tokenizer,
                some,
                cache=cache,
                model_fingerprint=model_fingerprint,
                max_new_tokens=config.max_answer_tokens,
                progress=partial(progress, f"base model answers {name} prompts"),
            )
            for some, name in zip(prompts, ("general", "held-out"), strict=True)
        )
    if not held_out:
        raise ConfigError(f"{config.prompts} holds {len(replay)} examples; give 4 or more")
    states = partial(build_reference, model)
    return GeneralReferences(
        states(replay, progress=partial(progress, "base model reads general examples"))
        if replay
        else None,
        states(held_out, progress=partial(progress, "base model reads held-out examples")),
    )


def _chosen(
    replay: Sequence[Any], held_out: Sequence[Any], config: RetentionConfig
) -> tuple[Sequence[Any], Sequence[Any]]:
    """As many as the settings ask for; none to replay if nothing is held back."""
    return replay[: config.num_replay if config.replay_share else 0], held_out[
        : config.num_held_out
    ]


def _answered(model: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[Encoded]:
    if not prompts:
        return []
    return encode_general(cached_general(model, tokenizer, prompts, **options), tokenizer)


def _check_lengths(
    tokenizer: Any, prompts: Sequence[str], config: RetentionConfig, max_positions: int
) -> None:
    for prompt in prompts:
        needed = len(prompt_ids(tokenizer, prompt)) + config.max_answer_tokens
        if needed > max_positions:
            raise ConfigError(
                f"general prompt {prompt[:40]!r} and an answer take {needed} tokens, the model's "
                f"context is {max_positions}; shorten it, or lower max_answer_tokens"
            )
