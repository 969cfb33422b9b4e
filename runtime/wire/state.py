"""Who may say what when: one ``WireConnection`` at each end of a connection.

It does no I/O. Every message this end says goes through ``send``, every frame it gets
through ``receive``; both apply the same tables (``rules.py``), so the ends cannot disagree.
They can only disagree in time: a message may be on its way to an end that has just said its
last word on a session. Such a message is legal, and ``receive`` drops it.
"""

from __future__ import annotations

from collections import deque

from privatelora.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from privatelora.runtime.wire.codec import decode, encode
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    Buffer,
    CloseSession,
    DropStep,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    Hello,
    Message,
    OpenSession,
    Ping,
    Pong,
    Role,
    StepBegin,
    StepEnd,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import MAX_PINGS, MAX_SESSIONS, WireLimits
from privatelora.runtime.wire.rules import (
    CONNECTION_TABLE,
    LATE,
    SESSION_TABLE,
    STEP_TABLE,
    Phase,
    SessionPhase,
    StepPhase,
)

_LATER = (
    ExchangeRequest
    | ExchangeReply
    | StepEnd
    | BackwardBegin
    | GradientRequest
    | GradientReply
    | BackwardEnd
    | DropStep
)
"""What is said of a step that has begun."""


class _Step:
    __slots__ = ("backward_follows", "phase", "point")

    def __init__(self, backward_follows: bool) -> None:
        self.backward_follows = backward_follows
        self.phase = StepPhase.FORWARD
        self.point: int | None = None
        """Last exchange point asked for in this direction."""


class _Session:
    __slots__ = ("last_step_id", "phase", "steps")

    def __init__(self, phase: SessionPhase) -> None:
        self.phase = phase
        self.last_step_id = -1
        self.steps: dict[int, _Step] = {}


class WireConnection:
    """One end's view of one connection."""

    def __init__(self, role: Role, limits: WireLimits) -> None:
        self._role = role
        self._peer_role = Role.EDGE if role is Role.CLOUD else Role.CLOUD
        self._limits = limits
        self._phase = Phase.NEW
        self._ended_here = False
        self._max_frame_nbytes: int | None = None
        self._pings: deque[int] = deque()
        """Nonces of those that wait for their Pong."""
        self._last_nonce = -1
        self._sessions: dict[int, _Session] = {}
        self._last_session_id = -1
        # At a cloud: sessions it ended by ErrorReply, oldest first. What may still come for
        # them was sent by an edge for which they were not over: at most MAX_SESSIONS, and the
        # last ones in here.
        self._failed: dict[int, None] = {}

    @property
    def phase(self) -> Phase:
        """Where the connection is."""
        return self._phase

    @property
    def sessions(self) -> dict[int, SessionPhase]:
        """Phases of the sessions that are not over, by id, ascending."""
        return {session_id: session.phase for session_id, session in self._sessions.items()}

    def steps(self, session_id: int) -> tuple[int, ...]:
        """Ids of a session's steps in flight or kept, ascending; none if it is over or unknown."""
        session = self._sessions.get(session_id)
        return tuple(session.steps) if session else ()

    def send(self, message: Message) -> tuple[Buffer, ...]:
        """Say ``message``: the parts of its frame, to be sent in the order of these calls.

        Raises LocalProtocolError, and changes nothing, if it may not be said now or is too
        large for the peer.
        """
        parts = encode(message)
        if self._max_frame_nbytes is not None:
            nbytes = sum(map(len, parts))
            if nbytes > self._max_frame_nbytes:
                raise LocalProtocolError(
                    f"{type(message).__name__} of {nbytes} bytes is too large: the "
                    f"{self._peer_role} accepts {self._max_frame_nbytes}; send fewer rows at once"
                )
        self._advance(message, self._role, LocalProtocolError)
        return parts

    def receive(self, frame: memoryview) -> Message | None:
        """Return the message in ``frame``, or None for one that came too late to matter.

        Raises RemoteProtocolError or VersionMismatch; from then on only an ErrorReply
        without a session can be sent, and nothing received.
        """
        if self._ended_here:
            return None
        try:
            if self._phase >= Phase.BROKEN:
                raise RemoteProtocolError(
                    f"a frame from the {self._peer_role} after its last one: the connection is "
                    f"{self._phase.name}"
                )
            message = decode(frame, self._limits)
            late = self._advance(message, self._peer_role, RemoteProtocolError)
        except ProtocolError:
            if self._phase is not Phase.ENDED:
                self._phase = Phase.BROKEN
            raise
        if late:
            return None
        if isinstance(message, Hello):
            self._max_frame_nbytes = message.max_frame_nbytes
        return message

    def _advance(self, message: Message, sender: Role, error: type[ProtocolError]) -> bool:
        """Check and record that ``sender`` says ``message``; return whether it came too late.

        Raises ``error`` before anything is changed.
        """
        if (
            self._phase is not Phase.ACTIVE
            or isinstance(message, Hello | Ping | Pong)
            or message.session_id is None
        ):
            self._advance_connection(message, sender, error)
            return False
        session_id = message.session_id
        session = self._sessions.get(session_id)
        if session is None:
            return self._advance_without_session(message, session_id, sender, error)
        phase = SESSION_TABLE[sender].get((type(message), session.phase))
        if phase is None:
            edge_is_done = self._role is Role.EDGE and session.phase is SessionPhase.CLOSING
            if edge_is_done and self._is_late(message, sender):
                return True
            raise error(
                f"the {sender} may not say {type(message).__name__} in session {session_id}, "
                f"which is {session.phase.name}"
            )
        if isinstance(message, StepBegin | TrainBegin):
            self._begin_step(session, message, error)
        elif isinstance(message, _LATER):
            _advance_step(session, message, error)
        elif phase is SessionPhase.CLOSING:
            session.steps.clear()
        elif phase is SessionPhase.OVER:
            del self._sessions[session_id]
            if session.phase is not SessionPhase.CLOSING and self._role is Role.CLOUD:
                self._remember_failed(session_id)
        session.phase = phase
        return False

    def _advance_connection(
        self, message: Message, sender: Role, error: type[ProtocolError]
    ) -> None:
        phase = CONNECTION_TABLE[sender].get((type(message), self._phase))
        if phase is None or (isinstance(message, ErrorReply) and message.session_id is not None):
            raise error(
                f"the {sender} may not say {type(message).__name__} on a connection that is "
                f"{self._phase.name}"
            )
        if isinstance(message, Hello) and message.role is not sender:
            raise error(f"the {sender} says Hello as {message.role}: one end must be each")
        if isinstance(message, Ping):
            if len(self._pings) >= MAX_PINGS:
                raise error(f"Ping with {MAX_PINGS} not yet answered, which is the limit")
            if message.nonce <= self._last_nonce:
                raise error(f"Ping {message.nonce} after {self._last_nonce}: nonces must ascend")
            self._pings.append(message.nonce)
            self._last_nonce = message.nonce
        elif isinstance(message, Pong):
            if not self._pings or self._pings[0] != message.nonce:
                raise error(f"Pong {message.nonce} is not the answer to the first Ping that waits")
            self._pings.popleft()
        if phase is Phase.ENDED:
            self._ended_here = sender is self._role
            self._sessions.clear()
        self._phase = phase

    def _advance_without_session(
        self, message: Message, session_id: int, sender: Role, error: type[ProtocolError]
    ) -> bool:
        if isinstance(message, OpenSession) and sender is Role.EDGE:
            if session_id <= self._last_session_id:
                raise error(
                    f"OpenSession {session_id} after {self._last_session_id}: ids must ascend"
                )
            if len(self._sessions) >= self._limits.max_sessions:
                raise error(
                    f"OpenSession {session_id} with {len(self._sessions)} sessions not yet over: "
                    f"the limit is {self._limits.max_sessions}"
                )
            opening = SessionPhase.OPENING_TRAINING if message.training else SessionPhase.OPENING
            self._sessions[session_id] = _Session(opening)
            self._last_session_id = session_id
            return False
        if session_id in self._failed and self._is_late(message, sender):
            if isinstance(message, CloseSession | ErrorReply):
                del self._failed[session_id]
            return True
        raise error(
            f"the {sender} may not say {type(message).__name__} in session {session_id}, "
            "which does not exist or is over"
        )

    def _begin_step(
        self, session: _Session, message: StepBegin | TrainBegin, error: type[ProtocolError]
    ) -> None:
        kind, step_id = type(message).__name__, message.step_id
        if step_id <= session.last_step_id:
            raise error(
                f"{kind} {step_id} after {session.last_step_id} in session {message.session_id}: "
                "ids must ascend"
            )
        trains = isinstance(message, TrainBegin)
        limit = self._limits.max_training_steps if trains else self._limits.max_steps
        if len(session.steps) >= limit:
            raise error(
                f"{kind} {step_id} with {len(session.steps)} steps in flight in session "
                f"{message.session_id}: the limit is {limit}"
            )
        session.steps[step_id] = _Step(isinstance(message, TrainBegin) and message.backward)
        session.last_step_id = step_id

    def _is_late(self, message: Message, sender: Role) -> bool:
        return sender is not self._role and type(message) in LATE[self._role]

    def _remember_failed(self, session_id: int) -> None:
        self._failed[session_id] = None
        if len(self._failed) > MAX_SESSIONS:
            del self._failed[next(iter(self._failed))]


def _advance_step(session: _Session, message: _LATER, error: type[ProtocolError]) -> None:
    """Check and record what is said of a step that has begun."""
    step = session.steps.get(message.step_id)
    phase = None if step is None else STEP_TABLE.get((type(message), step.phase))
    if step is None or phase is None:
        raise error(_describe(session, message))
    match message:
        # Points ascend on the way forward and descend on the way back.
        case ExchangeRequest(point=point):
            if step.point is not None and point <= step.point:
                raise error(_describe(session, message))
            step.point = point
        case GradientRequest(point=point):
            if step.point is not None and point >= step.point:
                raise error(_describe(session, message))
            step.point = point
        case ExchangeReply(point=point) | GradientReply(point=point):
            if point != step.point:
                raise error(_describe(session, message))
        case BackwardBegin():
            step.point = None
        case _:
            pass
    is_over = phase is StepPhase.KEPT and not step.backward_follows
    step.phase = StepPhase.OVER if is_over else phase
    if step.phase is StepPhase.OVER:
        del session.steps[message.step_id]


def _describe(session: _Session, message: _LATER) -> str:
    """Why ``message`` may not be said of its step."""
    point = getattr(message, "point", None)
    what = type(message).__name__ + ("" if point is None else f" for point {point}")
    where = f"step {message.step_id} of session {message.session_id}"
    step = session.steps.get(message.step_id)
    if step is None:
        return f"{what}: {where} is not in flight"
    return f"{what}: {where} is {step.phase.name}, " + (
        "not asked for any point yet" if step.point is None else f"last at point {step.point}"
    )
