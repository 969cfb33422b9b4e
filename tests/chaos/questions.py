"""What is asked in a chaos run: conversations whose answers are known."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

WORDS = ("the", "weather", "in", "mountains", "turns", "colder", "when", "wind", "comes", "north")
MAX_PROMPT_WORDS = 60
TOKENS = (8, 160)
"""Shortest and longest answer."""


@dataclass(frozen=True)
class Question:
    """One request. ``seed``: of a sampled answer; None is a greedy one."""

    prompt: str
    max_tokens: int
    seed: int | None

    def sampling(self) -> dict[str, Any]:
        """Fields of a request, or sampling parameters of an edge."""
        sampled = {} if self.seed is None else {"temperature": 1.0, "seed": self.seed}
        return {"max_tokens": self.max_tokens, "ignore_eos": True, **sampled}

    def __str__(self) -> str:
        how = "greedy" if self.seed is None else f"sampled with seed {self.seed}"
        return f"{self.max_tokens} tokens, {how}, after {self.prompt[-40:]!r}"


Ask = Callable[[Question], AsyncGenerator[str, None]]
"""Sends a request; yields the pieces of its answer."""


@dataclass(frozen=True)
class Conversation:
    """Two turns, and the answers of undisturbed daemons to them."""

    questions: tuple[Question, ...]
    answers: tuple[str, ...]


async def make_conversations(seed: int, number: int, ask: Ask) -> list[Conversation]:
    """Different ones for every seed, every other one sampled; ``ask`` asks undisturbed daemons."""
    chance = random.Random(seed)
    return [await _make(chance, ask, sampled=bool(i % 2)) for i in range(number)]


async def _make(chance: random.Random, ask: Ask, *, sampled: bool) -> Conversation:
    questions, answers = [], []
    said = ""
    for _ in range(2):
        said += " " + " ".join(chance.choices(WORDS, k=chance.randint(2, MAX_PROMPT_WORDS)))
        seed = chance.getrandbits(32) if sampled else None
        question = Question(said, chance.randint(*TOKENS), seed)
        answer = "".join([piece async for piece in ask(question)])
        questions.append(question)
        answers.append(answer)
        said += answer
    return Conversation(tuple(questions), tuple(answers))
