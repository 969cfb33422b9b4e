"""The ``data`` section of a training file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from privatelora.runtime.link_config import ConfigPath


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class JsonlSource(_Settings):
    """Lines of JSON in a file: ``prompt`` and ``completion``, or ``messages``."""

    kind: Literal["jsonl"]
    path: ConfigPath


class HubSource(_Settings):
    """A data set of the Hugging Face hub, in the format of one that is known by name."""

    kind: Literal["hub"]
    name: Literal["boolq", "piqa", "hellaswag", "mmlu", "gsm8k"]
    path: str | None = None
    """A folder or another id with the same columns; default: the published one."""
    split: str = "train"
    size: int | None = Field(default=None, gt=0)
    """Rows from the start; default: all."""


class ReasoningGymSource(_Settings):
    """A procedural task of reasoning-gym: as many examples as you like, without a network."""

    kind: Literal["reasoning-gym"]
    task: str
    """Its name, such as chain_sum."""
    size: int = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    """Held-out examples need another than those that are trained on."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the task."""


class FactsSource(_Settings):
    """Facts of the life of somebody who does not exist: nobody's data, and in no model."""

    kind: Literal["facts"]
    num_facts: int = Field(default=40, gt=0)
    seed: int = Field(default=0, ge=0)
    """Another seed is another person."""
    phrasings: Literal["train", "held-out"] = "train"
    """Held-out ones ask for the same in other words."""


Source = Annotated[
    JsonlSource | HubSource | ReasoningGymSource | FactsSource, Field(discriminator="kind")
]


class EncodingConfig(_Settings):
    """How examples become token ids."""

    render: Literal["chat", "text"] = "chat"
    """``chat``: by the model's chat template. ``text``: prompt and answer one after the other."""
    system: str | None = None
    """Said first in every conversation that does not begin with one of its own."""
    max_length: int | None = Field(default=None, gt=1)
    """Most tokens of one example; default: the model's context."""
    on_too_long: Literal["error", "drop"] = "error"
    """What happens to longer ones."""
    loss_on: Literal["answer", "all"] = "answer"
    """Tokens that are learnt: those of the answer, or those of the prompt too."""


class DataConfig(EncodingConfig):
    """What is learnt, and what is asked to see whether it was."""

    train: tuple[Source, ...] = Field(min_length=1)
    evaluate: dict[str, tuple[Source, ...]] = Field(default_factory=dict)
    """Held-out examples by a name of your choice: questions that are asked before and after."""
    max_answer_tokens: int = Field(default=32, gt=0)
    """Where an answer to one of these is cut off."""
