"""The shape that every benchmark's result has, and how two results are compared.

A result is JSON: which benchmark, on what machine, with what settings, and rows. A row says what
it is about in words and a few known numbers (ABOUT), and what was measured as a number, or as a
spread (``median``, ``min``, ``max``) of several runs. So two files can be laid side by side without
knowing the benchmark: rows that are about the same have the same words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from privatelora.errors import ConfigError
from privatelora.yaml_file import explain

SCHEMA_VERSION = 1
MAX_RESULT_NBYTES = 64 * 2**20
ABOUT = frozenset(
    (
        *("arrangement", "baseline", "codec", "codecs", "context", "direction", "dtype", "engine"),
        *("every", "link", "method", "num_threads", "payload", "policy", "prompt_tokens", "row"),
        *("rtt_ms", "scheduling", "scheme", "sessions", "set_mbps", "set_rtt_ms", "situation"),
        *("task", "tokens", "transport"),
    )
)
"""Keys that say what a row is about. Any other text does too; any other number was measured."""


class Machine(BaseModel):
    """Where it was measured: ``machine_facts``. What is computed alone says nothing of it."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    processor: str
    """Name of the processor."""
    num_cpus: int
    """Processors that this process could use."""
    python: str
    torch: str
    transformers: str
    system: str


class Result(BaseModel):
    """What a benchmark writes with ``--json``; each adds tables of its own beside ``rows``."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    """Raised when keys below change their meaning."""
    benchmark: str
    """The command that measured it."""
    method: str = ""
    """How, for people."""
    machine: Machine | None = None
    settings: dict[str, Any] = {}
    """What the command was given."""
    rows: list[dict[str, Any]] = []
    """What was measured: of each row what it is about, and figures."""


class Change(NamedTuple):
    """A figure that both results have. ``ratio``: the second's median over the first's."""

    about: str
    figure: str
    first: float
    second: float
    ratio: float
    is_within: bool | None
    """Whether the spreads overlap; None where one has none."""


def stamped(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as it is written; of a module's text as its ``method`` the part about that."""
    words = str(result.get("method") or "").partition("Method. ")[2]
    return {"schema_version": SCHEMA_VERSION, **result, "method": " ".join(words.split())}


def read_result(file: Path) -> Result:
    """Read a result. Raises ConfigError that says what is wrong with the file."""
    try:
        if file.stat().st_size > MAX_RESULT_NBYTES:
            raise ConfigError(f"{file}: larger than {MAX_RESULT_NBYTES} bytes, not a result")
        return Result.model_validate(json.loads(file.read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = explain(error, Result) if isinstance(error, ValidationError) else "not JSON"
        raise ConfigError(f"{file}: not the result of a benchmark: {reason}") from error


def compare(first: Result, second: Result) -> list[Change]:
    """Every figure that both have, in the order of the first.

    Raises ConfigError for results of different benchmarks: their figures have nothing in common.
    """
    if first.benchmark != second.benchmark:
        raise ConfigError(
            f"the first is a result of {first.benchmark}, the second of {second.benchmark}; "
            "compare two of the same benchmark"
        )
    others = dict(_figures(second))
    return [
        _change(about, name, value, others[about, name])
        for (about, name), value in _figures(first)
        if (about, name) in others
    ]


def _change(about: str, name: str, first: Any, second: Any) -> Change:
    a, b = _median(first), _median(second)
    within = None
    if isinstance(first, dict) and isinstance(second, dict):
        within = first["min"] <= second["max"] and second["min"] <= first["max"]
    return Change(about, name, a, b, b / a if a else math.nan, within)


def _median(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


def _figures(result: Result) -> Iterator[tuple[tuple[str, str], Any]]:
    """Each figure, by what its row is about and its name."""
    seen: dict[tuple[str, str], int] = {}
    of_the_whole = {"schema_version", "benchmark", "method", "machine", "settings"}
    for about, figures in _rows(result.model_dump(exclude=of_the_whole), ""):
        for name, value in figures.items():
            key = (about, name)
            seen[key] = seen.get(key, 0) + 1
            # Rows that say the same of themselves are told apart by their order.
            yield (about if seen[key] == 1 else f"{about} ({seen[key]})", name), value


def _rows(value: Any, about: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every table of a result, whatever holds it: its rows, with what is said above them."""
    if isinstance(value, list):
        for item in value:
            yield from _rows(item, about)
    if not isinstance(value, dict):
        return
    words = {
        key: item
        for key, item in value.items()
        if (isinstance(item, str | bool) or key in ABOUT) and not isinstance(item, dict | list)
    }
    said = ", ".join(f"{key} {item}" for key, item in words.items() if item is not None)
    here = ", ".join(part for part in (about, said) if part)
    figures = {key: item for key, item in value.items() if key not in words and _is_figure(item)}
    if figures:
        yield here, figures
    for key, item in value.items():
        if isinstance(item, dict) and not _is_figure(item):
            yield from _rows(item, ", ".join(part for part in (here, key) if part))
        elif isinstance(item, list):
            yield from _rows(item, here)


def _is_figure(value: Any) -> bool:
    if isinstance(value, dict):
        return {"median", "min", "max"} <= value.keys()
    return isinstance(value, int | float) and not isinstance(value, bool)
