"""When training gets the engine: in slices, between the steps of conversations.

A slice blocks everybody for as long as it takes. While answers are under way training rests after
each for as long as the slice took, so it has at most half of the time, and an answer takes at most
about twice as long beside it, whatever the sizes of both.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from privatelora.errors import CapacityError, PrivateLoRAError
from privatelora.runtime.batch_runner import BatchRunner
from privatelora.runtime.training_engine import Exchange

logger = logging.getLogger(__name__)

TURNS = 3
"""Of the event loop after each slice: a frame that came meanwhile is read in the first, heard by
whoever waits for it in the second, and what it brought is run in the third."""


@dataclass(slots=True, eq=False)
class TrainingPass:
    """A pass of ``training_engine.py`` on its way. ``finish`` takes what it comes to, ``ask`` what
    it needs an answer to, ``fail`` why it cannot go on."""

    work: Generator[Exchange | None, torch.Tensor | None, Any]
    finish: Callable[[Any], None]
    ask: Callable[[Exchange], None]
    fail: Callable[[PrivateLoRAError], None]
    answer: torch.Tensor | None = None
    is_waiting: bool = False
    """For the answer to what it asked."""
    is_closed: bool = False

    def close(self) -> None:
        """It does not go on; what it holds is free."""
        self.is_closed = True
        self.work.close()


class TrainingRunner:
    """Runs passes in turns, beside the runner of conversations."""

    def __init__(self, conversations: BatchRunner, device: torch.device) -> None:
        self._conversations = conversations
        self._device = device
        self._ready: deque[TrainingPass] = deque()
        self._handle: asyncio.Handle | None = None
        self._rests_until = 0.0
        self._turns_left = 0

    def run(self, one: TrainingPass, answer: torch.Tensor | None = None) -> None:
        """Begin a pass, or go on with one that asked for ``answer``."""
        one.answer, one.is_waiting = answer, False
        self._ready.append(one)
        if self._handle is None:
            self._soon()

    def _soon(self) -> None:
        self._handle = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._handle = None
        while self._ready and self._ready[0].is_closed:
            self._ready.popleft()
        if not self._ready:
            return
        if self._turns_left or self._conversations.is_due:
            self._turns_left = max(0, self._turns_left - 1)
            self._soon()
            return
        now = time.monotonic()
        if self._conversations.is_busy and now < self._rests_until:
            loop = asyncio.get_running_loop()
            self._handle = loop.call_later(self._rests_until - now, self._turn)
            return
        self._run_slice(self._ready.popleft())
        ended = time.monotonic()
        self._rests_until = ended + (ended - now)
        self._turns_left = TURNS
        self._soon()

    def _run_slice(self, one: TrainingPass) -> None:
        try:
            self._advance(one)
        except (RuntimeError, MemoryError) as error:  # torch reports exhausted memory as either
            logger.exception("a training step failed")
            failure = CapacityError(
                f"this cloud could not compute a training step: {error}; train with smaller "
                "batches, or try again later"
            )
            failure.__cause__ = error
            one.fail(failure)
        except Exception as error:  # a defect: nobody may wait for it in vain
            logger.exception("a training step failed")
            one.fail(PrivateLoRAError(f"a training step failed: {error}"))

    def _advance(self, one: TrainingPass) -> None:
        answer, one.answer = one.answer, None
        try:
            asked = one.work.send(answer)
        except StopIteration as end:
            one.finish(end.value)
            return
        if self._device.type == "cuda":
            # Launched is not done, and what others launch would wait behind it.
            torch.cuda.synchronize(self._device)
        if asked is None:
            self._ready.append(one)
        else:
            one.is_waiting = True
            one.ask(asked)
