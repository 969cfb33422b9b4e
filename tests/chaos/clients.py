"""Clients that hold conversations while faults happen, and compare every answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import aclosing

from tests.chaos.outcome import Record
from tests.chaos.questions import Ask, Conversation, Question

RECONNECT_TIMEOUT_S = 60.0
"""What the edge's settings say."""
DEADLINE_S = RECONNECT_TIMEOUT_S + 30.0
"""An answer that is not whole by then, counted from when it was last asked for, is hung."""
NUM_CLIENTS = 3

Tails = Callable[[], dict[str, list[str]]]
"""The last lines of each daemon's log."""


class AskAgainError(Exception):
    """The edge itself was killed, and with it whoever held the text."""


class LostError(Exception):
    """A client got an error, or half an answer."""


class Clients:
    """Each asks one thing after the other, of conversations in an order of its own."""

    def __init__(
        self, record: Record, conversations: list[Conversation], ask: Ask, tails: Tails
    ) -> None:
        self._record = record
        self._conversations = conversations
        self._ask = ask
        self._tails = tails
        self._is_over = False

    def end(self) -> None:
        """Let each end with the conversation that it holds."""
        self._is_over = True

    async def run(self) -> None:
        """Until ``end``; at least one conversation each."""
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_CLIENTS):
                group.create_task(self._converse(number))

    async def _converse(self, number: int) -> None:
        outcome = self._record.outcome
        chance = random.Random(f"{outcome.seed}/{outcome.transport}/{number}")
        while True:
            conversation = chance.choice(self._conversations)
            for question, answer in zip(conversation.questions, conversation.answers, strict=True):
                await self._one(question, answer)
            if self._is_over:
                return

    async def _one(self, question: Question, expected: str) -> None:
        outcome = self._record.outcome
        began_s = self._record.now_s
        while True:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    text = await self._follow(question)
            except AskAgainError:
                outcome.asked_again += 1
                continue
            except TimeoutError:
                outcome.hung += 1
                self._fail(f"hung beyond {DEADLINE_S:g} s", question, began_s)
            except LostError as error:
                outcome.lost += 1
                self._fail(f"lost: {error}", question, began_s)
            else:
                if text == expected:
                    outcome.equal += 1
                    outcome.tokens += question.max_tokens
                else:
                    outcome.different += 1
                    same = _common(text, expected)
                    self._fail(
                        f"different from character {same} on\n  expected {expected!r}\n"
                        f"  came     {text!r}",
                        question,
                        began_s,
                    )
            return

    async def _follow(self, question: Question) -> str:
        outcome = self._record.outcome
        pieces = []
        last = time.monotonic()
        # An iterator that is left before its end must not go on asking.
        async with aclosing(self._ask(question)) as answer:
            async for piece in answer:
                now = time.monotonic()
                outcome.longest_pause_s = max(outcome.longest_pause_s, now - last)
                last = now
                pieces.append(piece)
        return "".join(pieces)

    def _fail(self, what: str, question: Question, began_s: float) -> None:
        self._record.failure(f"{what}\n  {question}, asked at {began_s:.1f} s", self._tails())


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
