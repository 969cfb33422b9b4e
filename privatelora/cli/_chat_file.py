"""Conversations in files: a JSON list of objects with ``role`` and ``content``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from privatelora.errors import ConfigError
from privatelora.yaml_file import explain

if TYPE_CHECKING:
    from privatelora.runtime.chat import ChatMessage

MAX_FILE_NBYTES = 64 * 2**20


class _SavedMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


_SAVED = TypeAdapter(list[_SavedMessage])


def save_messages(name: str, messages: Sequence[ChatMessage]) -> None:
    """Write the file ``name``, which may begin with ~; ConfigError if that cannot be."""
    data = json.dumps(messages, indent=2, ensure_ascii=False).encode(errors="replace") + b"\n"
    try:
        # What people say to their own model is theirs alone.
        descriptor = os.open(os.path.expanduser(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {name}: {_reason(error)}") from error


def load_messages(name: str) -> list[ChatMessage]:
    """Read the file ``name``; ConfigError says what is wrong with it."""
    path = os.path.expanduser(name)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ConfigError(f"cannot read {name}: it is not a file")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_NBYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {name}: {_reason(error)}") from error
    if len(data) > MAX_FILE_NBYTES:
        raise ConfigError(f"{name}: larger than {MAX_FILE_NBYTES >> 20} MiB, not a conversation")
    try:
        saved = _SAVED.validate_json(data)
    except ValidationError as error:
        raise ConfigError(
            f"{name}: expected a JSON list of objects with role and content: {explain(error)}"
        ) from error
    return [{"role": turn.role, "content": turn.content} for turn in saved]


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)
