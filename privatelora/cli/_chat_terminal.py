"""Messages as people type them in a terminal, with editing, completion and history."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from privatelora.cli._chat_commands import COMMANDS, candidates

if TYPE_CHECKING:
    from privatelora.cli._chat_conversation import ChatConversation


async def terminal_messages(
    chat: ChatConversation, history_file: Path | None
) -> AsyncGenerator[str, None]:
    """What is typed, a message at a time, until Ctrl-D. Ctrl-C clears what is being typed.

    ``history_file``: where messages are kept for the next time; None: nowhere.
    """
    print(f"{chat.model} answers; /help lists the commands", file=sys.stderr)
    session = PromptSession[str](
        history=open_history(history_file),
        completer=_CommandCompleter(chat),
        key_bindings=_key_bindings(),
        multiline=True,
        prompt_continuation="  ",
    )
    while True:
        try:
            yield await session.prompt_async(lambda: f"{chat.model}> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def history_path() -> Path:
    """Where this user's programs keep such things, by the XDG base directory specification."""
    state = os.environ.get("XDG_STATE_HOME", "")
    home = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return home / "privatelora" / "history"


def open_history(file: Path | None) -> History:
    """The messages in ``file``, which only its owner may read; says so if that cannot be."""
    if file is None:
        return InMemoryHistory()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"what is typed is not kept: {file}: {error.strerror}", file=sys.stderr)
        return InMemoryHistory()
    return _CarefulHistory(str(file))


class _CarefulHistory(FileHistory):
    """A full disk is no reason to end a conversation."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError:
            return


class _CommandCompleter(Completer):
    """Completes commands, and what they are about."""

    def __init__(self, chat: ChatConversation) -> None:
        self._chat = chat
        self._files = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, _, argument = text.partition(" ")
        command = COMMANDS.get(name)
        if command is not None and command.argument == "FILE" and " " in text:
            yield from self._files.get_completions(Document(argument), complete_event)
            return
        word = text.rpartition(" ")[2]
        for candidate in candidates(self._chat, text):
            about = COMMANDS[candidate].description if candidate in COMMANDS else ""
            yield Completion(candidate, -len(word), display_meta=about)


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _end_message(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
