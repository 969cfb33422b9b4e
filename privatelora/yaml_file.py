"""YAML files that people write, read into pydantic models with messages for people."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from privatelora.errors import ConfigError
from privatelora.plain_file import open_plain

MAX_FILE_NBYTES = 1 << 20
MAX_NODES = 32_768
"""Keys, values and lists in one file; the largest there is, of tokens, has 20 001."""
MAX_DEPTH = 32
"""Reading a list takes time with the square of how many it lies in."""
MAX_NUMBER_CHARS = 64
MAX_EXPLAINED = 1000
"""A file made to be wrong in a million places would take a gigabyte to be explained."""

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, model: type[Model]) -> Model:
    """Return the file's content as ``model``.

    Relative paths inside are the reader's business; the validation context holds
    ``directory``, that of the file. Raises ConfigError naming the file, the key, and for an
    unknown key those that look like it.
    """
    return as_model(read_mapping(path, _keys(model)[0]), path, model)


def read_mapping(path: Path, example: str) -> dict[Any, Any]:
    """Return the file's keys and values, whatever they are.

    ``example``: a key, for people whose file has none. Raises ConfigError.
    """
    try:
        with open_plain(path) as file:
            text = file.read(MAX_FILE_NBYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(text) > MAX_FILE_NBYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_NBYTES} bytes, not a file of settings")
    try:
        values = yaml.load(text, _Loader)
    except Exception as error:  # a tag or a date with impossible text raises more than YAMLError
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = f" ({error.problem})" if isinstance(error, _RefusedError) else ""
        raise ConfigError(f"{path}{where}: not valid YAML{reason}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, such as '{example}: ...'")
    return values


class _RefusedError(yaml.MarkedYAMLError):
    """Valid YAML that has no place in a file of settings; ``problem`` says why."""


class _Loader(yaml.SafeLoader):
    """Reads a file of settings in time and memory that its size bounds.

    Aliases are refused: a kilobyte of them stands for gigabytes. A key that occurs twice has two
    meanings, of which YAML's loader would take the last.
    """

    def __init__(self, text: bytes) -> None:
        super().__init__(text)
        self._num_nodes = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise _refused(f"more than {MAX_NODES} keys and values", event)
        if isinstance(event, yaml.AliasEvent):
            raise _refused("an alias, which is not read here; write it out", event)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} lists in each other", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise _refused("a key that occurs twice", node)
        return mapping

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_NUMBER_CHARS:
            raise _refused(f"a number of {len(node.value)} characters", node)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refused(problem: str, where: Any) -> _RefusedError:
    """``where``: an event or node of PyYAML's."""
    return _RefusedError(problem=problem, problem_mark=where.start_mark)


def as_model(values: dict[Any, Any], path: Path, model: type[Model]) -> Model:
    """Return what was read from ``path`` as ``model``; raises as :func:`read_yaml` does."""
    try:
        return model.model_validate(values, context={"directory": path.absolute().parent})
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, model)}") from error


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Return the first field pydantic refused and why, in one line."""
    if error.error_count() > MAX_EXPLAINED:
        return f"{error.error_count()} of its values are not what they should be"
    problems = error.errors(include_url=False)
    # A misspelt key also makes the right one missing; the misspelling is the thing to say.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    location = problems[0]["loc"]
    if problems[0]["type"] == "extra_forbidden" and model is not None:
        return _unknown_key([str(part) for part in location], model)
    field = location[:1]
    reasons = [
        problem["msg"].removeprefix("Value error, ").removesuffix(" for <class 'pathlib.Path'>")
        for problem in problems
        if problem["loc"][:1] == field
    ]
    where = ".".join(str(part) for part in (location if len(problems) == 1 else field))
    return (f"{where}: " if where else "") + " or ".join(dict.fromkeys(reasons))


def _unknown_key(location: list[str], model: type[BaseModel]) -> str:
    for part in location[:-1]:
        field = model.model_fields.get(part)  # none for an index into a list
        model = (field and _inner_model(field.annotation)) or model
    known = _keys(model)
    close = difflib.get_close_matches(location[-1], known, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known keys: {', '.join(known)}"
    return f"unknown key {'.'.join(location)!r}; {hint}"


def _keys(model: type[BaseModel]) -> list[str]:
    """The model's keys, first those that must be there."""
    fields = model.model_fields
    return sorted(fields, key=lambda name: not fields[name].is_required())


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation, also as ``X | None`` or ``list[X]``."""
    arguments = get_args(annotation)
    if not arguments:
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        return annotation if is_model else None
    return next((model for part in arguments if (model := _inner_model(part))), None)
