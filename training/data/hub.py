"""Published data sets in their own formats, each question with the answer that is to be learnt."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from privatelora.errors import ConfigError
from privatelora.training.data.examples import Example, ask

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Format:
    """How one data set is published. ``read``: question and answer of a row; None: no answer."""

    hub_id: str
    config: str | None
    read: Callable[[Row], tuple[str, str] | None]
    compare: Literal["text", "number"] = "text"


def hub_examples(name: str, path: str | None, split: str, size: int | None) -> list[Example]:
    """Return examples of a data set, in its order.

    ``path``: a folder with a copy (Parquet, JSON lines, CSV, or as ``datasets`` saves it), or
    another id with the same columns. ``size``: rows from the start; None: all. Raises ConfigError
    if it cannot be had, has other columns, or its rows have no answers.
    """
    form = FORMATS[name]
    where = f"{path or form.hub_id}, split {split}"
    rows = _load(form, path, split)
    examples = []
    for number, row in enumerate(itertools.islice(rows, size)):
        try:
            found = form.read(row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{where}, row {number}: not a row of {name} ({type(error).__name__}: {error}); "
                f"its columns are {', '.join(row)}"
            ) from error
        if found is None:
            raise ConfigError(f"{where}, row {number}: has no answer; use another split")
        question, answer = found
        examples.append(ask(question, answer, where=f"{where}, row {number}", compare=form.compare))
    if not examples:
        raise ConfigError(f"{where}: holds no examples")
    return examples


def _load(form: Format, path: str | None, split: str) -> Any:
    datasets = _import_datasets()
    try:
        if path is None:
            return datasets.load_dataset(form.hub_id, form.config, split=split)
        if (Path(path) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(path)[split]
        if Path(path).exists():
            return datasets.load_dataset(str(Path(path)), split=split)
        return datasets.load_dataset(path, form.config, split=split)
    except Exception as error:  # of many libraries: the network's, the parsers', its own
        line = (str(error).strip() or type(error).__name__).partition("\n")[0]
        advice = "give path: with a local copy" if path is None else "look at path: and split:"
        raise ConfigError(
            f"data set {path or form.hub_id}, split {split}, cannot be had: {line}; {advice}"
        ) from error


def _choice(question: str, choices: Sequence[str], right: int) -> tuple[str, str] | None:
    """A question whose answer is a letter; None if the right one is not told."""
    if right == -1:
        return None
    if not 0 <= right < len(choices) <= len(LETTERS):
        raise ValueError(f"answer {right} of {len(choices)} choices")
    letters = LETTERS[: len(choices)]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    named = f"{', '.join(letters[:-1])} or {letters[-1]}"
    return "\n".join([question, *lines, f"Answer with {named}."]), letters[right]


def _boolq(row: Row) -> tuple[str, str] | None:
    answer = row["answer"] if "answer" in row else row["label"]  # as in SuperGLUE
    if int(answer) == -1:
        return None
    question = row["question"].strip().rstrip("?")
    asked = f"{row['passage'].strip()}\nQuestion: {question}?\nAnswer with yes or no."
    return asked, "yes" if answer else "no"


def _piqa(row: Row) -> tuple[str, str] | None:
    return _choice(row["goal"].strip(), (row["sol1"], row["sol2"]), int(row["label"]))


def _hellaswag(row: Row) -> tuple[str, str] | None:
    label = row["label"]
    question = f"{row['ctx'].strip()}\nHow does it go on?"
    return _choice(question, row["endings"], -1 if label == "" else int(label))


def _mmlu(row: Row) -> tuple[str, str] | None:
    return _choice(row["question"].strip(), row["choices"], int(row["answer"]))


def _gsm8k(row: Row) -> tuple[str, str] | None:
    return row["question"].strip(), row["answer"].strip()


FORMATS = {
    "boolq": Format("aps/super_glue", "boolq", _boolq),
    "piqa": Format("baber/piqa", None, _piqa),
    "hellaswag": Format("Rowan/hellaswag", None, _hellaswag),
    "mmlu": Format("cais/mmlu", "all", _mmlu),
    "gsm8k": Format("openai/gsm8k", "main", _gsm8k, compare="number"),
}


def _import_datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            "kind hub needs the datasets package: pip install 'privatelora[train]'"
        ) from error
