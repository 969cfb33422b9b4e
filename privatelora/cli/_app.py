"""What every command shares: how errors are shown, and how results are printed."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from privatelora.errors import ConfigError, PrivateLoRAError

# How long an idle worker thread of a tensor product spins before it sleeps (GNU OpenMP, which
# torch uses on Linux). Its own choice, about a millisecond, starves whatever else has work on
# the same processors: cloud and edge on one machine ran 20 times slower. Read when torch loads.
SPIN_COUNT = "5000"

MAX_LINE_CHARS = 2000
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


class Dtype(StrEnum):
    """A choice of floating-point format on a command line."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class LogFormat(StrEnum):
    """How a daemon writes its log."""

    TEXT = "text"
    JSON = "json"


LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="json: one object a line, for log collectors.")
]


def run(program: Callable[[], object]) -> None:
    """Run a program, such as a typer app, which ends the process itself.

    An error of this package is one line on stderr and exit status 1. Anything else that
    escapes is a defect and keeps its traceback.
    """
    set_thread_defaults()
    tolerate_encodings()
    try:
        program()
    except PrivateLoRAError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def printable(text: str) -> str:
    """One line of bounded length. Names in files may hold what moves a terminal's cursor."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]}..."


def set_thread_defaults() -> None:
    """Make this process a good neighbour; has to run before torch is imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def tolerate_encodings() -> None:
    """Let no byte that is not text end the program.

    What comes in so is marked, and refused where text is needed; what cannot be shown becomes ?.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # a program that runs us may have put another
            stream.reconfigure(errors=errors)


def check_writable(file: Path | None) -> None:
    """Raise ConfigError if ``file`` could not be written: before the work, not after it.

    Folders on the way to it are made.
    """
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
        except FileExistsError as error:
            raise ConfigError(f"cannot write {file}: {file.parent} is no folder") from error
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror}") from error


def print_line(line: str) -> None:
    """Print a line that a program waits for on stdout. Raises ConfigError if it cannot be."""
    try:
        print(line, flush=True)
    except OSError as error:
        # What is left in the buffer would be tried once more, and fail again, at the very end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ConfigError(f"cannot write to standard output: {error.strerror}") from error


def print_json(value: object) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2))


def print_fields(fields: dict[str, str]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name.ljust(width)}  {value}")


def format_nbytes(nbytes: int) -> str:
    """Return a size for a person: ``512 B``, ``3.4 MiB``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, and exception if any.

    ``exception``: its traceback, as text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.fromtimestamp(record.created, UTC)
        fields = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def set_up_logging(verbose: bool, log_format: LogFormat) -> None:
    """Log to stderr: warnings, and with ``verbose`` what happens as well."""
    handler = logging.StreamHandler()
    if log_format is LogFormat.JSON:
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
