"""From what a training file names to examples."""

from __future__ import annotations

from collections.abc import Iterable

from privatelora.training.data.config import (
    FactsSource,
    HubSource,
    JsonlSource,
    ReasoningGymSource,
    Source,
)
from privatelora.training.data.examples import Example
from privatelora.training.data.facts import fact_examples
from privatelora.training.data.files import read_examples
from privatelora.training.data.hub import hub_examples
from privatelora.training.data.procedural import reasoning_examples


def read_sources(sources: Iterable[Source]) -> list[Example]:
    """Return the examples of several sources, one after the other. Raises ConfigError."""
    return [example for source in sources for example in read_source(source)]


def read_source(source: Source) -> list[Example]:
    """Return the examples of one source, in its order. Raises ConfigError."""
    match source:
        case JsonlSource():
            return read_examples(source.path)
        case HubSource():
            return hub_examples(source.name, source.path, source.split, source.size)
        case ReasoningGymSource():
            return reasoning_examples(source.task, source.size, source.seed, source.options)
        case FactsSource():
            return fact_examples(source.num_facts, source.seed, source.phrasings)
