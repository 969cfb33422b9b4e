"""Typing to ``privatelora chat``: keys, lines, and the file of what was typed."""

from __future__ import annotations

import stat
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from privatelora.cli._chat_conversation import ChatConversation
from privatelora.cli._chat_terminal import (
    _CommandCompleter,
    history_path,
    open_history,
    terminal_messages,
)
from privatelora.cli.chat import joined_lines
from tests.unit.fakes import FakeModel, fake_service

CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


@pytest.fixture
def chat() -> ChatConversation:
    return ChatConversation(fake_service(FakeModel(), FakeModel()))


async def typed(chat: ChatConversation, history_file: Path | None = None) -> list[str]:
    async with aclosing(terminal_messages(chat, history_file)) as messages:
        return [message async for message in messages]


async def test_keys_make_messages(keyboard: PipeInput, chat: ChatConversation) -> None:
    keyboard.send_text(f"one{ENTER}")
    keyboard.send_text(f"two{ALT_ENTER}lines{ENTER}")
    keyboard.send_text(f"two\\{ENTER}again{ENTER}")
    keyboard.send_text(f"forget this{CTRL_C}")
    keyboard.send_text(f"last{ENTER}{CTRL_D}")
    assert await typed(chat) == ["one", "two\nlines", "two\nagain", "last"]


async def test_what_was_typed_is_there_the_next_time_and_nobody_elses(
    keyboard: PipeInput, chat: ChatConversation, tmp_path: Path
) -> None:
    file = tmp_path / "state" / "privatelora" / "history"
    keyboard.send_text(f"first{ENTER}two{ALT_ENTER}lines{ENTER}{CTRL_D}")
    assert await typed(chat, file) == ["first", "two\nlines"]
    assert list(FileHistory(str(file)).load_history_strings()) == ["two\nlines", "first"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    open_history(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_without_a_file_nothing_is_kept(
    keyboard: PipeInput, chat: ChatConversation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keyboard.send_text(f"secret{ENTER}{CTRL_D}")
    assert await typed(chat) == ["secret"]
    (tmp_path / "file").touch()
    keyboard.send_text(f"secret{ENTER}{CTRL_D}")
    assert await typed(chat, tmp_path / "file" / "history") == ["secret"]
    assert "what is typed is not kept: " in capsys.readouterr().err


def test_the_history_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_path() == Path("/state/privatelora/history")
    monkeypatch.setenv("HOME", "/home/me")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert history_path() == Path("/home/me/.local/state/privatelora/history")


def test_tab_completes(chat: ChatConversation, tmp_path: Path) -> None:
    (tmp_path / "talk.json").touch()
    completer = _CommandCompleter(chat)

    def completed(text: str) -> list[str]:
        completions = completer.get_completions(Document(text), CompleteEvent())
        return [
            text[: len(text) + completion.start_position] + completion.text
            for completion in completions
        ]

    assert completed("/mo") == ["/model"]
    assert completed("/model ") == ["/model 0", "/model 1"]
    assert completed("/set max_") == ["/set max_tokens"]
    assert completed(f"/load {tmp_path}/ta") == [f"/load {tmp_path}/talk.json"]
    assert completed("Hello ") == []


async def test_lines_are_joined_by_a_backslash() -> None:
    async def lines() -> AsyncIterator[str]:
        for line in ("one\n", "two\\\n", "lines\\\n", "more\n", "\n", "ends\\"):
            yield line

    joined: AsyncGenerator[str, None] = joined_lines(lines())
    assert [message async for message in joined] == ["one", "two\nlines\nmore", "", "ends\n"]
