"""Decides which steps of which sessions the engine runs next. Pure: no I/O, no clock, no tensors.

The engine cuts its layers at the exchange points into segments, which every step runs in order;
before each but the first it waits for its exchange reply. A batch holds steps of one segment,
decode rows and prefill chunks of any sessions, within a row budget. The scheduler never waits for
a batch to grow: what is ready runs.

Fair shares. The time of the engine is shared between clients, and the share of a client between
its sessions, by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). A step that
becomes ready for a segment gets

    start    = max(virtual time, finish of the session's step before)
    finish   = start + weight * (rows + BATCH_OVERHEAD_ROWS)
    due from = start - weight * slack

with the weight being how many sessions its client has at work. It is due once the virtual time
has come to ``due from``; the virtual time moves when nothing is due, to the earliest step. Of the
segments whose first step is due the policy (``scheduling_policies.py``) chooses one. Its steps
ride in the order of ``due from``, as many as fit, due or not. The slack is how far a session may
get ahead of its share, so that policies have something to choose from.

Nobody starves. Let a step be ready, R others be ready at the time, and S sessions be open beside
its own. If it is due, the virtual time stands still until it has run, and each session can put
itself ahead of it by its slack only: it is in one of the next
1 + R + S * (SLACK_TOKENS * num_segments + 1) batches, while weights stay as they are. A step that
is not due waits in addition for what the others are behind. (In practice batches hold many steps
and the wait is a few batches.)
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from privatelora.errors import LocalProtocolError
from privatelora.runtime.scheduling_policies import Policy, laggards_first

BATCH_OVERHEAD_ROWS = 8
"""A batch takes time before its first row: on a processor that of about so many rows.

It weighs long steps against short ones, and those up to it count as decode steps; it need not be
exact.
"""

SLACK_TOKENS = 2
"""How far a session may get ahead of its share, in tokens decoded alone.

Less than about one keeps those behind from catching up in one go, and batches small.
"""

MAX_LEFT_OVER = 8
"""So many ready steps that do not fit are passed over in search of smaller ones."""


class _State(enum.Enum):
    WAITING = enum.auto()
    """For its exchange reply."""
    BLOCKED = enum.auto()
    """By the step before it in its session, which has not run this segment and is not ready."""
    READY = enum.auto()
    RUNNING = enum.auto()
    OVER = enum.auto()


@dataclass(slots=True)
class _Client:
    num_sessions: int = 0
    num_busy_sessions: int = 0
    """Those that have steps."""


@dataclass(slots=True, eq=False)
class _Session:
    number: int
    client_name: str
    client: _Client
    steps: dict[int, _Step] = field(default_factory=dict)
    """Those that are not over, by number, ascending."""
    finish: int = 0
    """Virtual time, of the step that became ready last."""


@dataclass(slots=True, eq=False)
class _Step:
    session: _Session
    number: int
    num_rows: int
    earlier: _Step | None
    """The step before it in its session, unless that is over."""
    later: _Step | None = None
    segment: int = 0
    """The one it runs, or runs next."""
    state: _State = _State.BLOCKED
    due_from: int | None = None
    """Virtual time; None until it is ready for its segment."""
    ready_since: float = 0.0

    @property
    def may_run(self) -> bool:
        """Whether the step before it has run this segment or is ready to, ahead of it."""
        earlier = self.earlier
        return (
            earlier is None
            or earlier.segment > self.segment
            or (earlier.segment == self.segment and earlier.state is _State.READY)
        )

    @property
    def is_short(self) -> bool:
        return self.num_rows <= BATCH_OVERHEAD_ROWS


@dataclass(slots=True, eq=False)
class Batch:
    """Steps for the engine to run through one segment, together.

    ``steps``: (session, step) each; of one session, earlier steps come first. ``num_rows``: of
    all of them. ``queued_s``: how long each was ready before, in seconds.
    """

    segment: int
    steps: tuple[tuple[int, int], ...]
    num_rows: int
    queued_s: tuple[float, ...] = ()
    _members: list[_Step] = field(default_factory=list, repr=False)


class _ReadySteps:
    """The steps that are ready for one segment: a ``ReadySegment``."""

    __slots__ = ("_added", "_heap", "_num_added", "num_short_steps", "segment")

    def __init__(self, segment: int) -> None:
        self.segment = segment
        self.num_short_steps = 0
        self._added: dict[_Step, int] = {}
        """Each and the number of its entry in the heap, in the order they became ready."""
        self._heap: list[tuple[int, int, _Step]] = []
        """(due_from, number of the entry, step); entries not in ``_added`` are void."""
        self._num_added = 0

    @property
    def num_steps(self) -> int:
        return len(self._added)

    @property
    def oldest_since(self) -> float:
        return next(iter(self._added)).ready_since

    @property
    def due_from(self) -> int:
        """Of the first step; there must be one."""
        heap, added = self._heap, self._added
        while added.get(heap[0][2]) != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0]

    def add(self, step: _Step, due_from: int) -> None:
        self._num_added += 1
        self._added[step] = self._num_added
        self.num_short_steps += step.is_short
        heapq.heappush(self._heap, (due_from, self._num_added, step))

    def remove(self, step: _Step) -> None:
        del self._added[step]
        self.num_short_steps -= step.is_short
        if not self._added:
            self._heap.clear()

    def choose(self, max_rows: int) -> list[_Step]:
        """The first steps that fit into ``max_rows``, or the very first if that is larger."""
        chosen: list[_Step] = []
        put_back: list[tuple[int, int, _Step]] = []
        heap, added = self._heap, self._added
        room, num_left_over = max_rows, 0
        while heap and room > 0 and num_left_over < MAX_LEFT_OVER:
            entry = heapq.heappop(heap)
            step = entry[2]
            if added.get(step) != entry[1]:
                continue
            put_back.append(entry)
            earlier = step.earlier
            follows_left_over = (
                earlier is not None and earlier.segment == self.segment and earlier not in chosen
            )
            if follows_left_over or (chosen and step.num_rows > room):
                num_left_over += 1
            else:
                chosen.append(step)
                room -= step.num_rows
        if num_left_over:
            for entry in put_back:
                heapq.heappush(heap, entry)
        return chosen


class Scheduler:
    """Knows where every step is, and forms batches of those that are ready.

    A mistake of the caller is LocalProtocolError, and changes nothing. Times are seconds of one
    clock of the caller's.
    """

    def __init__(
        self, num_segments: int, policy: Policy = laggards_first, max_batch_rows: int = 256
    ) -> None:
        """For an engine of ``num_segments``; a step above ``max_batch_rows`` runs alone.

        On a processor a batch takes longer with every row, so ``max_batch_rows`` bounds how long
        decode steps are held up by prefill chunks.
        """
        self._policy = policy
        self._max_batch_rows = max_batch_rows
        self._segments = [_ReadySteps(segment) for segment in range(num_segments)]
        self._slack = SLACK_TOKENS * num_segments * (1 + BATCH_OVERHEAD_ROWS)
        self._clients: dict[str, _Client] = {}
        self._sessions: dict[int, _Session] = {}
        self._virtual_time = 0
        self._num_ready = 0

    @property
    def has_ready(self) -> bool:
        """Whether ``next_batch`` has one."""
        return self._num_ready > 0

    def open(self, session: int, client: str) -> None:
        """A session of ``client`` may have steps from now on."""
        if session in self._sessions:
            raise LocalProtocolError(f"session {session} is open already")
        account = self._clients.setdefault(client, _Client())
        account.num_sessions += 1
        self._sessions[session] = _Session(session, client, account)

    def close(self, session: int) -> None:
        """Forget a session and all its steps, also those in a batch that runs."""
        closed = self._session(session)
        for step in closed.steps.values():
            if step.state is _State.READY:
                self._take_out(step)
            step.state = _State.OVER
        del self._sessions[session]
        client = closed.client
        client.num_sessions -= 1
        client.num_busy_sessions -= bool(closed.steps)
        if not client.num_sessions:
            del self._clients[closed.client_name]

    def begin(self, session: int, step: int, num_rows: int, now: float) -> None:
        """A step of ``num_rows`` is there, ready for segment 0."""
        owner = self._session(session)
        earlier = next(reversed(owner.steps.values()), None)
        if earlier is not None and earlier.number >= step:
            raise LocalProtocolError(
                f"session {session}: step {step} cannot begin after step {earlier.number}"
            )
        if num_rows < 1:
            raise LocalProtocolError(f"session {session}: step {step} has {num_rows} rows")
        if earlier is None:
            owner.client.num_busy_sessions += 1
        begun = owner.steps[step] = _Step(owner, step, num_rows, earlier)
        if earlier is not None:
            earlier.later = begun
        self._release(begun, now)

    def supply(self, session: int, step: int, now: float) -> None:
        """The exchange reply is there that a step waits for."""
        found = self._session(session).steps.get(step)
        if found is None or found.state is not _State.WAITING:
            raise LocalProtocolError(f"session {session}: step {step} does not wait for a reply")
        found.state = _State.BLOCKED
        self._release(found, now)

    def next_batch(self, now: float) -> Batch | None:
        """What to run now, or None if nothing is ready. Its steps run until ``done``.

        A batch that failed is never done; its sessions must be closed.
        """
        if not self._num_ready:
            return None
        ready = [(steps.due_from, steps) for steps in self._segments if steps.num_steps]
        self._virtual_time = max(self._virtual_time, min([due_from for due_from, _ in ready]))
        due = [steps for due_from, steps in ready if due_from <= self._virtual_time]
        chosen = self._segments[self._policy(due)]
        members = chosen.choose(self._max_batch_rows)
        for step in members:
            self._take_out(step)
            step.state = _State.RUNNING
        for step in members:
            for later in _followers(step, _State.READY):
                self._take_out(later)
                later.state = _State.BLOCKED
        return Batch(
            segment=chosen.segment,
            steps=tuple([(step.session.number, step.number) for step in members]),
            num_rows=sum([step.num_rows for step in members]),
            queued_s=tuple([now - step.ready_since for step in members]),
            _members=members,
        )

    def done(self, batch: Batch, now: float) -> None:
        """The engine ran ``batch``: each step waits for its next reply, or is over."""
        if not batch._members:
            raise LocalProtocolError(f"a batch of segment {batch.segment} is done already")
        members = [step for step in batch._members if step.state is not _State.OVER]
        batch._members = []
        num_segments = len(self._segments)
        for step in members:
            step.segment += 1
            step.state = _State.WAITING
            step.due_from = None
            if step.segment == num_segments:
                self._end(step)
        for step in members:
            later = step.later
            if later is not None and later.state is _State.BLOCKED:
                self._release(later, now)

    def _release(self, step: _Step, now: float) -> None:
        """Make a blocked step ready, and those that it blocked, unless it is blocked still."""
        if not step.may_run:
            return
        self._put_in(step, now)
        for later in _followers(step, _State.BLOCKED):
            self._put_in(later, now)

    def _put_in(self, step: _Step, now: float) -> None:
        if step.due_from is None:
            session = step.session
            weight = session.client.num_busy_sessions
            start = max(self._virtual_time, session.finish)
            session.finish = start + weight * (step.num_rows + BATCH_OVERHEAD_ROWS)
            step.due_from = start - weight * self._slack
            step.ready_since = now
            ahead = step.earlier
            if ahead is not None and ahead.segment == step.segment and ahead.due_from is not None:
                # Its weight may have been smaller then, but it stays ahead.
                step.due_from = max(step.due_from, ahead.due_from)
        step.state = _State.READY
        self._segments[step.segment].add(step, step.due_from)
        self._num_ready += 1

    def _take_out(self, step: _Step) -> None:
        self._segments[step.segment].remove(step)
        self._num_ready -= 1

    def _end(self, step: _Step) -> None:
        step.state = _State.OVER
        session = step.session
        del session.steps[step.number]
        if step.later is not None:
            step.later.earlier = None
        if not session.steps:
            session.client.num_busy_sessions -= 1

    def _session(self, number: int) -> _Session:
        session = self._sessions.get(number)
        if session is None:
            raise LocalProtocolError(f"session {number} is not open")
        return session


def _followers(step: _Step, state: _State) -> Iterator[_Step]:
    """The steps right behind ``step`` in its session at the same segment, while in ``state``."""
    later = step.later
    while later is not None and later.segment == step.segment and later.state is state:
        following = later.later
        yield later
        later = following
