"""Procedural tasks of reasoning-gym: examples without end, from a seed."""

from __future__ import annotations

import difflib
import importlib
import random
import warnings
from typing import Any

from privatelora.errors import ConfigError
from privatelora.training.data.examples import Example, ask


def reasoning_examples(
    task: str, size: int, seed: int, options: dict[str, Any] | None = None
) -> list[Example]:
    """Return ``size`` examples of a task; the same arguments give the same ones.

    Questions that occur twice are kept once, so there may be fewer. Other seeds give others, but a
    task that has few questions draws some of them again. Raises ConfigError for an unknown task,
    or for options that it does not take.
    """
    gym = _import_gym()
    names = sorted(gym.factory.DATASETS)
    if task not in names:
        close = difflib.get_close_matches(task, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"
        raise ConfigError(f"reasoning-gym has no task {task!r}; {hint}")
    try:
        # Its examples i have the seeds seed + i, so neighbouring seeds would share all but one.
        apart = random.Random(f"procedural {seed}").randrange(2**30)
        dataset = gym.create_dataset(task, size=size, seed=apart, **(options or {}))
        entries = [dataset[i] for i in range(size)]
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"reasoning-gym {task}: {error or type(error).__name__}") from error
    examples: dict[str, Example] = {}
    for i, entry in enumerate(entries):
        question, answer = str(entry["question"]), str(entry["answer"])
        where = f"reasoning-gym {task}, seed {seed}, number {i}"
        examples.setdefault(
            question,
            ask(
                question,
                answer,
                where=where,
                compare="number" if _is_number(answer) else "text",
            ),
        )
    return list(examples.values())


def _is_number(answer: str) -> bool:
    try:
        float(answer)
    except ValueError:
        return False
    return True


def _import_gym() -> Any:
    try:
        with warnings.catch_warnings():
            # Where modules are compiled at their first import, one that it uses has such a warning.
            warnings.simplefilter("ignore", SyntaxWarning)
            return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ConfigError(
            "kind reasoning-gym needs that package: pip install 'privatelora[train]'"
        ) from error
