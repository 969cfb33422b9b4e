"""``privatelora chat``: talk to the model in a terminal."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privatelora.errors import PrivateLoRAError

if TYPE_CHECKING:
    from privatelora.runtime.chat import ChatMessage, Conversation, TextModel
    from privatelora.runtime.config import EdgeConfig

EXAMPLE = "Example: privatelora chat configs/edge-loopback.yaml"


def register(app: typer.Typer) -> None:
    """Add the command to a program."""
    app.command("chat", epilog=EXAMPLE)(chat)


def chat(
    config: Annotated[Path, typer.Argument(help="YAML file of the edge; see configs/.")],
) -> None:
    """Talk to the model: one line is one message; Ctrl-C stops an answer, Ctrl-D ends."""
    from privatelora.runtime.config import load_edge_config
    from privatelora.runtime.edge import Edge
    from privatelora.runtime.loop import run

    settings = load_edge_config(config)
    edge = Edge(settings)

    async def main() -> None:
        from privatelora.runtime.chat import Conversation

        try:
            await edge.model.link()
            await _talk(edge.text, Conversation(edge.text), settings)
        finally:
            await edge.aclose()

    run(main())


async def _talk(text: TextModel, conversation: Conversation, settings: EdgeConfig) -> None:
    from privatelora.cli._input import read_lines

    messages: list[ChatMessage] = []
    if settings.system_prompt is not None:
        messages.append({"role": "system", "content": settings.system_prompt})
    _prompt()
    async for line in read_lines():
        if line.strip():
            messages.append({"role": "user", "content": line.strip()})
            answer = await _answer(text, conversation, settings, messages)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})
        _prompt()
    print()


async def _answer(
    text: TextModel,
    conversation: Conversation,
    settings: EdgeConfig,
    messages: list[ChatMessage],
) -> str | None:
    """Print the answer as it comes; return it, as far as it came, or None if there was none."""
    from privatelora.runtime.figures import figures_line
    from privatelora.runtime.generation import GenerationStats

    stats = GenerationStats()
    pieces: list[str] = []

    async def stream() -> None:
        prompt_ids = text.encode_chat(messages)
        async for piece in conversation.stream(prompt_ids, settings.sampling, stats):
            pieces.append(piece)
            print(piece, end="", flush=True)

    task = asyncio.create_task(stream())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await task
        print(flush=True)
        print(f"[{figures_line(stats)}]", file=sys.stderr)
    except asyncio.CancelledError:
        print(flush=True)
        print("[stopped]", file=sys.stderr)
    except PrivateLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return "".join(pieces) or None


def _prompt() -> None:
    if sys.stdin.isatty():
        print("\n> ", end="", flush=True)
