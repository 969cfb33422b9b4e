"""``privatelora chat``: talk to the model in a terminal."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privatelora.errors import PrivateLoRAError

if TYPE_CHECKING:
    from privatelora.cli._chat_conversation import ChatConversation, Messages

EXAMPLE = "Example: privatelora chat configs/edge-loopback.yaml"

CONTROLS = {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}
VISIBLE = dict.fromkeys(CONTROLS, "\N{REPLACEMENT CHARACTER}")
"""What a model says must not command the terminal."""


def register(app: typer.Typer) -> None:
    """Add the command to a program."""
    app.command("chat", epilog=EXAMPLE)(chat)


def chat(
    config: Annotated[Path, typer.Argument(help="YAML file of the edge; see configs/.")],
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Keep no file of what was typed.")
    ] = False,
) -> None:
    """Talk to the model: Ctrl-C stops an answer, Ctrl-D ends, /help lists the commands.

    In a terminal, what was typed is kept in XDG_STATE_HOME/privatelora/history for the next time.
    Otherwise one line of standard input is one message or command; \\ at its end joins the next.
    """
    from privatelora.runtime.config import load_edge_config
    from privatelora.runtime.edge import Edge
    from privatelora.runtime.loop import run

    edge = Edge(load_edge_config(config))

    async def main() -> None:
        from privatelora.cli._chat_conversation import ChatConversation

        try:
            await edge.connect()
            conversation = ChatConversation(edge.service)
            async with aclosing(_messages(conversation, no_history)) as messages:
                await talk(conversation, messages)
        finally:
            await edge.aclose()

    run(main())


def _messages(conversation: ChatConversation, no_history: bool) -> AsyncGenerator[str, None]:
    if sys.stdin.isatty() and sys.stdout.isatty():
        from privatelora.cli._chat_terminal import history_path, terminal_messages

        return terminal_messages(conversation, None if no_history else history_path())

    from privatelora.cli._input import read_lines

    return joined_lines(read_lines())


async def joined_lines(lines: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    r"""Lines as messages; one that ends with \ goes on in the next."""
    message = ""
    async for line in lines:
        text = line.removesuffix("\n")
        if text.endswith("\\"):
            message += text.removesuffix("\\") + "\n"
        else:
            yield message + text
            message = ""
    if message:
        yield message


async def talk(conversation: ChatConversation, lines: AsyncGenerator[str, None]) -> None:
    """Do what each line says until there are no more, or one says that it is the last."""
    from privatelora.cli._chat_commands import take

    async for line in lines:
        if not line.strip():
            continue
        outcome = await _unless_stopped(take(conversation, line.strip()))
        if outcome is None:
            continue
        if outcome.is_over:
            return
        if outcome.text:
            print(outcome.text, flush=True)
        if outcome.to_answer is not None:
            await _unless_stopped(_answer(conversation, outcome.to_answer))


async def _answer(conversation: ChatConversation, asked: Messages) -> None:
    """Print the answer as it comes, and what it took."""
    from privatelora.runtime.figures import figures_line
    from privatelora.runtime.generation import GenerationStats

    stats = GenerationStats()
    is_terminal = sys.stdout.isatty()
    has_begun = False

    def show(piece: str) -> None:
        nonlocal has_begun
        has_begun = True
        print(piece.translate(VISIBLE) if is_terminal else piece, end="", flush=True)

    try:
        await conversation.answer(asked, show, stats)
    finally:
        if has_begun:
            print(flush=True)
    print(f"[{figures_line(stats)}]", file=sys.stderr)


async def _unless_stopped(work: Coroutine[Any, Any, Any]) -> Any:
    """Do ``work`` until its end, Ctrl-C or an error, which is shown; its result or None."""
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        print("[stopped]", file=sys.stderr)
    except PrivateLoRAError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return None
