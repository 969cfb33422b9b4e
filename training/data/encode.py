"""Examples as the token ids that serving would see."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from privatelora.errors import ConfigError
from privatelora.training.data.config import EncodingConfig
from privatelora.training.data.examples import Encoded, Example, Message

logger = logging.getLogger(__name__)

DEFAULT = EncodingConfig()


def encode_all(
    examples: Iterable[Example],
    tokenizer: Any,
    settings: EncodingConfig = DEFAULT,
    *,
    max_positions: int,
) -> list[Encoded]:
    """Return the token ids of examples that are not too long; at least one has to be left.

    ``max_positions``: the model's context. Raises ConfigError for one that is too long, unless
    these are to be dropped.
    """
    limit = min(settings.max_length or max_positions, max_positions)
    encoded, dropped = [], 0
    for example in examples:
        one = encode(example, tokenizer, settings)
        if len(one.input_ids) <= limit:
            encoded.append(one)
        elif settings.on_too_long == "drop":
            dropped += 1
        else:
            raise ConfigError(
                f"{example.where}: {len(one.input_ids)} tokens, and {limit} is the most; shorten "
                "it, or set on_too_long: drop"
                + (", or raise max_length" if limit < max_positions else "")
            )
    if dropped:
        logger.warning("%d examples of more than %d tokens are left out", dropped, limit)
    if not encoded:
        raise ConfigError("no example is left to train on")
    return encoded


def encode(example: Example, tokenizer: Any, settings: EncodingConfig = DEFAULT) -> Encoded:
    """Return one example's ids: of the prompt as serving makes them, and of the answer to its end.

    Raises ConfigError if the model's chat template refuses the conversation, or there is none.
    """
    if settings.render == "text":
        prompt_ids = prompt_to_ids(example, tokenizer, settings)
        ids = tokenizer.encode(example.answer, add_special_tokens=False)
        answer_ids = [*ids, tokenizer.eos_token_id]
    else:
        turns = _turns(example, settings)
        prompt = _render(turns, tokenizer, example, True)
        whole = _render([*turns, Message("assistant", example.answer)], tokenizer, example, False)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer_ids = _answer_ids(prompt, prompt_ids, whole, example.answer, tokenizer)
    return Encoded((*prompt_ids, *answer_ids), len(answer_ids))


def prompt_to_ids(
    example: Example, tokenizer: Any, settings: EncodingConfig = DEFAULT
) -> list[int]:
    """Return the ids that the answer follows, those that serving makes of the same prompt."""
    if settings.render == "chat":
        text = _render(_turns(example, settings), tokenizer, example, True)
        return list(tokenizer.encode(text, add_special_tokens=False))
    if len(example.prompt) > 1:
        raise ConfigError(f"{example.where}: a conversation needs render: chat")
    before = "" if settings.system is None else settings.system
    return list(tokenizer.encode(before + example.question))


def _turns(example: Example, settings: EncodingConfig) -> list[Message]:
    turns = list(example.prompt)
    if settings.system is not None and turns[0].role != "system":
        turns.insert(0, Message("system", settings.system))
    return turns


def _render(turns: Sequence[Message], tokenizer: Any, example: Example, is_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ConfigError("this model has no chat template; set render: text")
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
        )
    except Exception as error:  # a template is a program, and may refuse in its own words
        raise ConfigError(
            f"{example.where}: the model's chat template refuses this conversation: {error}"
        ) from error


def _answer_ids(
    prompt: str, prompt_ids: list[int], whole: str, answer: str, tokenizer: Any
) -> list[int]:
    """Ids from where the prompt ends to the end of the turn."""
    all_ids = tokenizer.encode(whole, add_special_tokens=False)
    if all_ids[: len(prompt_ids)] == prompt_ids:
        ids = all_ids[len(prompt_ids) :]
    else:
        # Templates may write the turns that have been otherwise than the one that begins.
        rest = whole[len(prompt) :] if whole.startswith(prompt) else answer
        ids = tokenizer.encode(rest, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else [*ids, end]
