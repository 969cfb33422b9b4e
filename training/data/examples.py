"""What one training or held-out example is, before and after it becomes token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """What is said, and what is to be answered.

    ``prompt``: the conversation up to the answer, the last turn the user's. ``where``: the file and
    line, or the data set and row, for messages. ``compare``: how an answer is compared with the
    right one, as words or as its last number.
    """

    prompt: tuple[Message, ...]
    answer: str
    where: str = ""
    compare: Literal["text", "number"] = "text"

    @property
    def question(self) -> str:
        """The last turn."""
        return self.prompt[-1].content


def ask(
    question: str,
    answer: str,
    *,
    where: str = "",
    compare: Literal["text", "number"] = "text",
) -> Example:
    """Return an example of one question."""
    return Example((Message("user", question),), answer, where, compare)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example; the last ``num_answer`` are the answer's, end of turn included.

    ``reference``: place in a retention reference; -1 for an example that is to be learnt.
    """

    input_ids: tuple[int, ...]
    num_answer: int
    reference: int = -1
