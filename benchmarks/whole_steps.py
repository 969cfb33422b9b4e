"""What the cloud's scheduler is compared with: batches that steps enter and leave together."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from privatelora.runtime.scheduler import Batch, Scheduler

LOCKSTEP, WHOLE_STEPS = "lockstep", "whole steps"


class _Outside(NamedTuple):
    session: int
    step: int
    num_rows: int
    since: float


class WholeSteps(Scheduler):
    """A scheduler with a door: steps go through all segments together, and nobody joins them.

    When nothing is inside, the steps at the door enter in the order they came, up to
    ``max_steps`` and ``max_batch_rows``. They run each segment together, once the last of them
    has its reply. With ``max_steps`` of 1 this is lockstep: every round trip is waited out.
    """

    def __init__(
        self, num_segments: int, max_steps: int | None = None, max_batch_rows: int = 256
    ) -> None:
        """As ``Scheduler``; by default only the rows bound how many steps enter together."""
        super().__init__(num_segments, max_batch_rows=max_batch_rows)
        self._max_steps = max_batch_rows if max_steps is None else max_steps
        self._outside: deque[_Outside] = deque()
        self._inside: set[tuple[int, int]] = set()
        self._waiting: set[tuple[int, int]] = set()
        """Those inside that have no reply yet."""

    @property
    def has_ready(self) -> bool:
        """Whether ``next_batch`` has one."""
        if not self._inside:
            return bool(self._outside)
        return not self._waiting and super().has_ready

    def close(self, session: int) -> None:
        """Forget a session and all its steps; who waited for them may go on."""
        super().close(session)
        self._outside = deque(step for step in self._outside if step.session != session)
        self._inside = {key for key in self._inside if key[0] != session}
        self._waiting &= self._inside

    def begin(self, session: int, step: int, num_rows: int, now: float) -> None:
        """A step comes to the door."""
        self._outside.append(_Outside(session, step, num_rows, now))

    def supply(self, session: int, step: int, now: float) -> None:
        """One reply less to wait for."""
        super().supply(session, step, now)
        self._waiting.discard((session, step))

    def next_batch(self, now: float) -> Batch | None:
        """All that are inside, once all their replies are there."""
        if not self._inside:
            self._let_in()
        return None if self._waiting else super().next_batch(now)

    def done(self, batch: Batch, now: float) -> None:
        """On to the next segment, or out."""
        super().done(batch, now)
        still_there = self._inside.intersection(batch.steps)
        if batch.segment == len(self._segments) - 1:
            self._inside -= still_there
        else:
            self._waiting |= still_there

    def _let_in(self) -> None:
        room = self._max_batch_rows
        while self._outside and len(self._inside) < self._max_steps:
            first = self._outside[0]
            if self._inside and first.num_rows > room:
                return
            self._outside.popleft()
            room -= first.num_rows
            self._inside.add((first.session, first.step))
            super().begin(first.session, first.step, first.num_rows, first.since)
