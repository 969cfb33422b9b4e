"""Runs the steps of all sessions through one engine, in the batches that the scheduler forms."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from privatelora.errors import CapacityError, PrivateLoRAError
from privatelora.partition.plan import ExchangePoint
from privatelora.runtime.engine import Engine, Step
from privatelora.runtime.scheduler import Batch, Scheduler

logger = logging.getLogger(__name__)

Deliver = Callable[[Step, ExchangePoint | None], None]
"""Takes a step that has come to an exchange point, whose z it holds, or to its end (None)."""
Fail = Callable[[PrivateLoRAError], None]
"""Takes the reason why a step cannot go on, and closes its session."""


@dataclass(slots=True)
class _Running:
    step: Step
    deliver: Deliver
    fail: Fail
    point: int = 0
    """The one it waits at, or waited at last, and since when."""
    waits_since: float = 0.0


class Observer(Protocol):
    """Is told what a runner did, in between two batches. Times are of ``time.monotonic``."""

    def note_batch(self, batch: Batch, started: float, ended: float) -> None:
        """The engine ran a batch."""

    def note_wait(self, key: tuple[int, int], point: int, started: float, ended: float) -> None:
        """A step (session, step) waited for its exchange reply."""


class BatchRunner:
    """The engine's only caller on a cloud. Sessions have numbers of the caller's choice.

    A batch runs in a callback of the event loop, so whatever has arrived by then can be part of
    it, and between two batches everybody else has a turn. Only a step that is alone runs at once.
    """

    def __init__(
        self, engine: Engine, scheduler: Scheduler, observers: Sequence[Observer] = ()
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._observers = observers
        self._running: dict[tuple[int, int], _Running] = {}
        self._handle: asyncio.Handle | None = None

    def open(self, session: int, client: str) -> None:
        """A session of ``client``, among whom the engine's time is shared."""
        self._scheduler.open(session, client)

    def close(self, session: int, step_ids: Iterable[int]) -> None:
        """Forget a session and ``step_ids``, those of it that are in flight."""
        self._scheduler.close(session)
        for step_id in step_ids:
            self._running.pop((session, step_id), None)
        if self._scheduler.has_ready:  # of a scheduler that lets others wait for a session
            self._run_soon()

    def begin(self, session: int, step_id: int, step: Step, deliver: Deliver, fail: Fail) -> None:
        """Run a step, as soon as it is its turn; one of the two is called after each segment."""
        self._running[session, step_id] = _Running(step, deliver, fail)
        self._scheduler.begin(session, step_id, step.context.num_positions, time.monotonic())
        self._run()

    def supply(self, session: int, step_id: int, layers: Sequence[int], y: torch.Tensor) -> None:
        """Go on with a step that waits, y (n, len(layers) * y_size) being what it waits for."""
        key = session, step_id
        running = self._running[key]
        running.step.supply(layers, y)
        now = time.monotonic()
        self._scheduler.supply(session, step_id, now)
        for observer in self._observers:
            observer.note_wait(key, running.point, running.waits_since, now)
        self._run()

    @property
    def is_due(self) -> bool:
        """Whether a batch runs as soon as the event loop has its turn."""
        return self._handle is not None

    @property
    def is_busy(self) -> bool:
        """Whether a step is in flight, if only waiting for its reply."""
        return bool(self._running)

    def _run(self) -> None:
        if len(self._running) == 1 and self._handle is None:
            # The only step on this cloud: nothing could join it, so it goes without the detour.
            self._run_one()
        else:
            self._run_soon()

    def _run_soon(self) -> None:
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_soon(self._run_one)

    def _run_one(self) -> None:
        self._handle = None
        started = time.monotonic()
        batch = self._scheduler.next_batch(started)
        if batch is None:
            return
        running = [self._running[key] for key in batch.steps]
        steps = [one.step for one in running]
        try:
            point = self._engine.advance_batch(steps)
        except (RuntimeError, MemoryError) as error:  # torch reports exhausted memory as either
            logger.exception("a batch of %d rows failed", batch.num_rows)
            failure = CapacityError(f"this cloud could not compute: {error}; try again later")
            failure.__cause__ = error
            for key, one in zip(batch.steps, running, strict=True):
                if self._running.get(key) is one:  # not closed with a step before it
                    one.fail(failure)
        else:
            ended = time.monotonic()
            self._scheduler.done(batch, ended)
            for observer in self._observers:
                observer.note_batch(batch, started, ended)
            self._deliver(batch, running, point)
            if point is not None and not self._scheduler.has_ready:
                # Nobody else needs the engine, so the wait is for free.
                self._engine.precompute_batch(steps)
        if self._scheduler.has_ready:
            self._run_soon()

    def _deliver(
        self, batch: Batch, running: Sequence[_Running], point: ExchangePoint | None
    ) -> None:
        for key, one in zip(batch.steps, running, strict=True):
            if self._running.get(key) is not one:
                continue  # delivering an earlier one closed their session
            if point is None:
                del self._running[key]
            one.deliver(one.step, point)
            if point is not None:
                one.point, one.waits_since = point.index, time.monotonic()
