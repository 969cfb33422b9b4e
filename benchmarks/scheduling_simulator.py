"""A cloud and its edges, simulated around the real scheduler.

Discrete events and seeded random numbers: the same arguments give the same result. Time is in
seconds. The network delivers the messages of a session in order.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from privatelora.runtime.scheduler import Batch, Scheduler


@dataclass(frozen=True)
class Costs:
    """What the engine needs for a batch of one segment: for itself, each of its rows and steps.

    By default about a layer of SmolLM2-135M in fp32 on two cores, with the messages of a step.
    """

    batch_s: float = 0.6e-3
    row_s: float = 0.06e-3
    step_s: float = 0.08e-3

    def of(self, batch: Batch) -> float:
        """Of one batch."""
        return self.batch_s + batch.num_rows * self.row_s + len(batch.steps) * self.step_s


@dataclass(frozen=True)
class Edge:
    """One session: how far away it is, and what it asks for.

    ``rtt_s``: round trip times are uniform between these. ``chunks``: rows of the chunks of a
    prompt, which are begun together. ``num_tokens``: of an answer. ``num_turns``: prompts and
    answers, ``think_s`` apart. ``reply_s`` to compute y, and ``token_s`` from the final hidden
    state to the next step, vary by a fifth.
    """

    client: str
    rtt_s: tuple[float, float]
    start_s: float = 0.0
    chunks: tuple[int, ...] = (1,)
    num_tokens: int = 16
    num_turns: int = 1
    think_s: float = 0.0
    reply_s: float = 0.3e-3
    token_s: float = 2e-3


@dataclass
class Turn:
    """When an edge asked, and when each token of the answer came."""

    asked_s: float
    tokens_s: list[float] = field(default_factory=list)

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.tokens_s)]


@dataclass
class Outcome:
    """What came of a simulation, until ``end_s``. ``turns``: of each edge."""

    turns: list[list[Turn]]
    end_s: float = 0.0
    busy_s: float = 0.0
    num_batches: int = 0
    num_steps: int = 0
    num_rows: int = 0


class _What(enum.Enum):
    TURN = enum.auto()
    TOKEN = enum.auto()
    REPLY = enum.auto()
    DONE = enum.auto()


class _Session:
    def __init__(self, edge: Edge, seed: str) -> None:
        self.edge = edge
        self.turns: list[Turn] = []
        self.next_step = 0
        self.segments: dict[int, int] = {}
        """Of the steps that are under way, by number."""
        self._random = random.Random(seed)
        self._last_arrival_s = 0.0

    def arrival_s(self, now: float, compute_s: float) -> float:
        """When the answer arrives to what the cloud sends now."""
        rtt_s = self._random.uniform(*self.edge.rtt_s)
        arrival_s = now + rtt_s + compute_s * self._random.uniform(0.8, 1.2)
        self._last_arrival_s = max(self._last_arrival_s, arrival_s)
        return self._last_arrival_s


class _Simulation:
    def __init__(
        self, scheduler: Scheduler, num_segments: int, edges: Sequence[Edge], seed: int
    ) -> None:
        self._scheduler = scheduler
        self._num_segments = num_segments
        self._sessions = [_Session(edge, f"{seed} {n}") for n, edge in enumerate(edges)]
        self._order = itertools.count()
        self._events: list[tuple[float, int, _What, int, int]] = []
        self._running: Batch | None = None
        for number, edge in enumerate(edges):
            scheduler.open(number, edge.client)
            self._at(edge.start_s, _What.TURN, number)

    def run(self, costs: Costs, until_s: float) -> Outcome:
        outcome = Outcome([session.turns for session in self._sessions])
        scheduler, events = self._scheduler, self._events
        while events and events[0][0] <= until_s:
            now = outcome.end_s = events[0][0]
            while events and events[0][0] <= now:
                _, _, what, number, step = heapq.heappop(events)
                match what:
                    case _What.REPLY:
                        scheduler.supply(number, step, now)
                    case _What.TOKEN:
                        self._begin(number, 1, now)
                    case _What.TURN:
                        self._sessions[number].turns.append(Turn(now))
                        for num_rows in self._sessions[number].edge.chunks:
                            self._begin(number, num_rows, now)
                    case _What.DONE:
                        self._deliver(now)
            if self._running is None:
                batch = self._running = scheduler.next_batch(now)
                if batch is not None:
                    self._at(now + costs.of(batch), _What.DONE)
                    outcome.busy_s += costs.of(batch)
                    outcome.num_batches += 1
                    outcome.num_steps += len(batch.steps)
                    outcome.num_rows += batch.num_rows
        return outcome

    def _at(self, when: float, what: _What, number: int = 0, step: int = 0) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, number, step))

    def _begin(self, number: int, num_rows: int, now: float) -> None:
        session = self._sessions[number]
        session.segments[session.next_step] = 0
        self._scheduler.begin(number, session.next_step, num_rows, now)
        session.next_step += 1

    def _deliver(self, now: float) -> None:
        batch, self._running = self._running, None
        if batch is None:
            return
        self._scheduler.done(batch, now)
        for number, step in batch.steps:
            session = self._sessions[number]
            session.segments[step] += 1
            if session.segments[step] < self._num_segments:
                at = session.arrival_s(now, session.edge.reply_s)
                self._at(at, _What.REPLY, number, step)
                continue
            del session.segments[step]
            if not session.segments:
                self._deliver_token(number, now)

    def _deliver_token(self, number: int, now: float) -> None:
        session, edge = self._sessions[number], self._sessions[number].edge
        tokens_s = session.turns[-1].tokens_s
        tokens_s.append(now + edge.rtt_s[0] / 2)
        if len(tokens_s) < edge.num_tokens:
            self._at(session.arrival_s(now, edge.token_s), _What.TOKEN, number)
        elif len(session.turns) < edge.num_turns:
            self._at(session.arrival_s(now, edge.token_s) + edge.think_s, _What.TURN, number)


def simulate(
    scheduler: Scheduler,
    num_segments: int,
    edges: Sequence[Edge],
    costs: Costs | None = None,
    seed: int = 0,
    until_s: float = float("inf"),
) -> Outcome:
    """Let ``edges`` use a cloud until they have all they want, or until ``until_s``."""
    return _Simulation(scheduler, num_segments, edges, seed).run(costs or Costs(), until_s)
