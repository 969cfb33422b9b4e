"""The slash commands of ``privatelora chat``, without a terminal."""

from __future__ import annotations

import difflib
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from privatelora.cli._app import format_nbytes
from privatelora.cli._chat_file import load_messages, save_messages
from privatelora.errors import RequestError

if TYPE_CHECKING:
    from privatelora.cli._chat_conversation import ChatConversation, Messages
    from privatelora.runtime.edge_service import EdgeStatus
    from privatelora.runtime.sent_log import SentLog

NONE, DEFAULT = "none", "default"

HELP_FOOT = """\
A message ends with Enter; Alt-Enter, or \\ at the end of a line, begins another line of it.
// begins a message that begins with /. Ctrl-C stops an answer, Ctrl-D ends."""


class Outcome(NamedTuple):
    """What came of a line: something to show, to answer, or the end."""

    text: str = ""
    to_answer: Messages | None = None
    is_over: bool = False


class Command(NamedTuple):
    """A slash command. ``argument``: as the help shows it."""

    argument: str
    description: str
    run: Callable[[ChatConversation, str], Awaitable[Outcome]]


async def take(chat: ChatConversation, line: str) -> Outcome:
    """Do what a line says: a command, or a message to be answered.

    Raises RequestError or ConfigError for what cannot be done; nothing has changed then.
    """
    if not line.startswith("/") or line.startswith("//"):
        return Outcome(to_answer=chat.asking(line.removeprefix("/")))
    words = line.split(maxsplit=1)
    name, argument = words[0], words[1].strip() if len(words) > 1 else ""
    command = COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists them"
        raise RequestError(
            f"there is no command {name[:40]!r}; {hint} (a message that begins with / is sent "
            "with //)"
        )
    if not argument and command.argument[:1].isalpha():
        raise RequestError(f"{name} needs more: {name} {command.argument}")
    if argument and not command.argument:
        raise RequestError(f"{name} stands alone; {argument[:40]!r} is too much")
    return await command.run(chat, argument)


def candidates(chat: ChatConversation, before_cursor: str) -> list[str]:
    """What the last word of an unfinished command could be, without names of files."""
    if not before_cursor.startswith("/") or "\n" in before_cursor:
        return []
    *earlier, word = before_cursor.split(" ")
    known: list[str] = []
    if not earlier:
        known = list(COMMANDS)
    elif earlier == ["/model"]:
        known = list(chat.service.models)
    elif earlier == ["/set"]:
        known = list(type(chat.params).model_fields)
    return [name for name in known if name.startswith(word)]


async def _help(chat: ChatConversation, argument: str) -> Outcome:
    usages = {name: f"{name} {command.argument}" for name, command in COMMANDS.items()}
    width = max(map(len, usages.values()))
    lines = [f"{usages[name].ljust(width)}  {COMMANDS[name].description}" for name in COMMANDS]
    return Outcome("\n".join([*lines, HELP_FOOT]))


async def _model(chat: ChatConversation, argument: str) -> Outcome:
    if argument:
        chat.switch(argument)
        return Outcome(f"{argument} answers from now on")
    marks = {chat.model: "*"}
    return Outcome("\n".join(f"{marks.get(name, ' ')} {name}" for name in chat.service.models))


async def _new(chat: ChatConversation, argument: str) -> Outcome:
    chat.begin_anew()
    return Outcome("a new conversation")


async def _retry(chat: ChatConversation, argument: str) -> Outcome:
    return Outcome(to_answer=chat.asking_again())


async def _undo(chat: ChatConversation, argument: str) -> Outcome:
    return Outcome(f"forgotten: {_shortened(chat.undo())}")


async def _system(chat: ChatConversation, argument: str) -> Outcome:
    if argument:
        chat.system_prompt = None if argument == NONE else argument
    return Outcome(f"system prompt: {chat.system_prompt or NONE}")


async def _set(chat: ChatConversation, argument: str) -> Outcome:
    if not argument:
        values = chat.params.model_dump(mode="json")
        width = max(map(len, values))
        return Outcome("\n".join(f"{name.ljust(width)}  {_show(values[name])}" for name in values))
    name, *rest = argument.split(maxsplit=1)
    if not rest:
        raise RequestError(f"/set {name[:40]} needs a value; {DEFAULT} is the edge's own")
    if rest[0] == DEFAULT:
        chat.reset_sampling(name)
    else:
        chat.set_sampling(name, _value(rest[0]))
    values = chat.params.model_dump(mode="json")
    if name not in values:
        raise RequestError(f"there is no setting {name[:40]!r}; /set lists them")
    return Outcome(f"{name}: {_show(values[name])}")


async def _save(chat: ChatConversation, argument: str) -> Outcome:
    messages = chat.with_system_prompt(chat.messages)
    save_messages(argument, messages)
    return Outcome(f"{len(messages)} messages written to {argument}")


async def _load(chat: ChatConversation, argument: str) -> Outcome:
    messages = load_messages(argument)
    text = f"{len(messages)} messages read from {argument}"
    chat.system_prompt = chat.service.system_prompt
    if messages and messages[0]["role"] == "system":
        chat.system_prompt = messages.pop(0)["content"]
    chat.replace(messages)
    return Outcome(text)


async def _status(chat: ChatConversation, argument: str) -> Outcome:
    status = await chat.service.status()
    fields = {**_link_fields(status), "model": chat.model, **_sent_fields(chat.service.sent)}
    width = max(map(len, fields))
    return Outcome("\n".join(f"{name.ljust(width)}  {fields[name]}" for name in fields))


async def _quit(chat: ChatConversation, argument: str) -> Outcome:
    return Outcome(is_over=True)


COMMANDS: dict[str, Command] = {
    "/help": Command("", "This list.", _help),
    "/model": Command("[NAME]", "List the models, or let another one answer.", _model),
    "/new": Command("", "Begin a new conversation.", _new),
    "/retry": Command("", "Answer the last message again.", _retry),
    "/undo": Command("", "Forget the last message and its answer.", _undo),
    "/system": Command("[TEXT]", f"Show the system prompt, or set it; {NONE} removes it.", _system),
    "/set": Command(
        "[NAME VALUE]", f"List how answers are sampled, or set it; {DEFAULT} resets.", _set
    ),
    "/save": Command("FILE", "Write the conversation to a file, as JSON.", _save),
    "/load": Command("FILE", "Go on from such a file.", _load),
    "/status": Command("", "Cloud, round trip time, and what was sent.", _status),
    "/quit": Command("", "End.", _quit),
}


def _link_fields(status: EdgeStatus) -> dict[str, str]:
    fields = {"cloud": status.cloud}
    if status.connected:
        fields["software"] = str(status.software)
        fields["round trip"] = "unknown" if status.rtt_ms is None else f"{status.rtt_ms:.2f} ms"
    else:
        fields["not connected"] = str(status.problem)
    fields["context"] = f"{status.max_positions} tokens"
    fields["caches"] = f"{status.open_conversations} kept on the cloud"
    return fields


def _sent_fields(sent: SentLog) -> dict[str, str]:
    """What was sent by kind, and the codecs in which numbers went out last."""
    codecs = {message.kind: message.codec for message in sent.recent() if message.codec}
    fields = {}
    for kind, (messages, nbytes) in sent.totals.items():
        codec = f" of {codecs[kind]}" if kind in codecs else ""
        fields[f"sent {kind}"] = f"{messages:,} messages, {format_nbytes(nbytes)}{codec}"
    return fields


def _value(text: str) -> Any:
    """A value as JSON has it, or else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
