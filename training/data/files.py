"""Examples from a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

from privatelora.errors import ConfigError
from privatelora.plain_file import open_plain
from privatelora.training.data.examples import Example, Message, Role, ask

MAX_LINE_NBYTES = 1 << 20
MAX_FILE_NBYTES = 1 << 31
FORMATS = (
    'write {"prompt": "...", "completion": "..."} or '
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)


def read_examples(path: Path) -> list[Example]:
    """Return the examples of a JSONL file, one a line; empty lines are skipped.

    A line holds ``prompt`` and ``completion``, or ``messages`` as OpenAI writes them, the last of
    them the assistant's: that is the answer. Raises ConfigError naming the line.
    """
    examples = []
    for where, line in _lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "not readable"
            raise ConfigError(f"{where}: not JSON ({reason}); {FORMATS}") from error
        examples.append(_example(value, where))
    if not examples:
        raise ConfigError(f"{path} holds no examples; {FORMATS}, one a line")
    return examples


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """What each line is called, and its text."""
    try:
        with open_plain(path) as file:
            number = total = 0
            while line := file.readline(MAX_LINE_NBYTES + 1):
                number += 1
                total += len(line)
                where = f"{path} line {number}"
                if len(line) > MAX_LINE_NBYTES:
                    raise ConfigError(f"{where}: longer than {MAX_LINE_NBYTES} bytes")
                if total > MAX_FILE_NBYTES:
                    raise ConfigError(f"{path}: larger than {MAX_FILE_NBYTES} bytes; split it")
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise ConfigError(
                        f"{where}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
                    ) from error
                if text.strip():
                    yield where, text
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _example(value: Any, where: str) -> Example:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: not an object; {FORMATS}")
    keys = set(value)
    if keys == {"prompt", "completion"}:
        texts = {key: _text(value[key], key, where) for key in ("prompt", "completion")}
        return ask(texts["prompt"], texts["completion"], where=where)
    if keys == {"messages"}:
        return _conversation(value["messages"], where)
    odd = sorted(keys - {"prompt", "completion", "messages"})
    known = (
        f"unknown key {odd[0]!r}" if odd else f"the keys are {', '.join(sorted(keys)) or 'none'}"
    )
    raise ConfigError(f"{where}: {known}; {FORMATS}")


def _conversation(turns: Any, where: str) -> Example:
    if not isinstance(turns, list) or len(turns) < 2:
        raise ConfigError(f"{where}: messages is not a list of two or more; {FORMATS}")
    messages = [_message(turn, f"{where}, message {i + 1}") for i, turn in enumerate(turns)]
    spoken = messages[1:] if messages[0].role == "system" else messages
    for i, message in enumerate(spoken):
        due = ("user", "assistant")[i % 2]
        if message.role != due:
            raise ConfigError(
                f"{where}: message {len(messages) - len(spoken) + i + 1} is the {message.role}'s "
                f"where the {due}'s is due; user and assistant take turns, after one system "
                "message at most"
            )
    if len(spoken) < 2 or spoken[-1].role != "assistant":
        raise ConfigError(f"{where}: the last message is not the assistant's, which is the answer")
    return Example(tuple(messages[:-1]), messages[-1].content, where)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        raise ConfigError(f"{where}: needs role and content, and nothing else; {FORMATS}")
    if turn["role"] not in get_args(Role):
        raise ConfigError(f"{where}: role must be one of {', '.join(get_args(Role))}")
    return Message(cast(Role, turn["role"]), _text(turn["content"], "content", where))


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: {key} must be text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {key} holds half of a surrogate pair") from error
    return value
