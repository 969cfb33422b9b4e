"""Who may say what when, as tables: of the connection, of each session on it, of each step in one.

What is not listed is not allowed. ``state.py`` goes by them at both ends.
"""

from __future__ import annotations

from enum import IntEnum

from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    CloseSession,
    DropStep,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    Hello,
    Message,
    Ping,
    Pong,
    Role,
    SessionClosed,
    SessionOpened,
    StepBegin,
    StepEnd,
    TrainBegin,
)


class Phase(IntEnum):
    """Where a connection is."""

    NEW = 0
    """Nothing was said."""
    GREETED = 1
    """The edge said Hello."""
    ACTIVE = 2
    """So did the cloud."""
    BROKEN = 3
    """The peer broke the protocol; this end may still say so in an ErrorReply."""
    ENDED = 4
    """One end said ErrorReply without a session."""


class SessionPhase(IntEnum):
    """Where a session is; one that is OVER is forgotten."""

    OPENING = 0
    OPEN = 1
    CLOSING = 2
    """The edge said its last word."""
    OVER = 3
    """So did the cloud."""
    OPENING_TRAINING = 4
    """As OPENING, of a session for training."""
    TRAINING = 5
    """As OPEN."""


class StepPhase(IntEnum):
    """Where a step is; one that is OVER is forgotten."""

    FORWARD = 0
    """The cloud computes."""
    FORWARD_WAITING = 1
    """It waits for the edge's reply at an exchange point."""
    KEPT = 2
    """It was asked to keep what the backward pass needs."""
    BACKWARD = 3
    BACKWARD_WAITING = 4
    OVER = 5


# What follows when this role says this in this phase.
# An ErrorReply without a session is meant here.
CONNECTION_TABLE: dict[Role, dict[tuple[type[Message], Phase], Phase]] = {
    Role.EDGE: {
        (Hello, Phase.NEW): Phase.GREETED,
        (Ping, Phase.ACTIVE): Phase.ACTIVE,
        (ErrorReply, Phase.GREETED): Phase.ENDED,
        (ErrorReply, Phase.ACTIVE): Phase.ENDED,
        (ErrorReply, Phase.BROKEN): Phase.ENDED,
    },
    Role.CLOUD: {
        (Hello, Phase.GREETED): Phase.ACTIVE,
        (Pong, Phase.ACTIVE): Phase.ACTIVE,
        (ErrorReply, Phase.NEW): Phase.ENDED,
        (ErrorReply, Phase.GREETED): Phase.ENDED,
        (ErrorReply, Phase.ACTIVE): Phase.ENDED,
        (ErrorReply, Phase.BROKEN): Phase.ENDED,
    },
}

# The same in a session of an ACTIVE connection. The edge's OpenSession makes it, OPENING or
# OPENING_TRAINING.
SESSION_TABLE: dict[Role, dict[tuple[type[Message], SessionPhase], SessionPhase]] = {
    Role.EDGE: {
        (StepBegin, SessionPhase.OPEN): SessionPhase.OPEN,
        (ExchangeReply, SessionPhase.OPEN): SessionPhase.OPEN,
        (TrainBegin, SessionPhase.TRAINING): SessionPhase.TRAINING,
        (ExchangeReply, SessionPhase.TRAINING): SessionPhase.TRAINING,
        (BackwardBegin, SessionPhase.TRAINING): SessionPhase.TRAINING,
        (GradientReply, SessionPhase.TRAINING): SessionPhase.TRAINING,
        (DropStep, SessionPhase.TRAINING): SessionPhase.TRAINING,
        (CloseSession, SessionPhase.OPENING): SessionPhase.CLOSING,
        (CloseSession, SessionPhase.OPENING_TRAINING): SessionPhase.CLOSING,
        (CloseSession, SessionPhase.OPEN): SessionPhase.CLOSING,
        (CloseSession, SessionPhase.TRAINING): SessionPhase.CLOSING,
        (ErrorReply, SessionPhase.OPENING): SessionPhase.CLOSING,
        (ErrorReply, SessionPhase.OPENING_TRAINING): SessionPhase.CLOSING,
        (ErrorReply, SessionPhase.OPEN): SessionPhase.CLOSING,
        (ErrorReply, SessionPhase.TRAINING): SessionPhase.CLOSING,
    },
    Role.CLOUD: {
        (SessionOpened, SessionPhase.OPENING): SessionPhase.OPEN,
        (SessionOpened, SessionPhase.OPENING_TRAINING): SessionPhase.TRAINING,
        (ExchangeRequest, SessionPhase.OPEN): SessionPhase.OPEN,
        (StepEnd, SessionPhase.OPEN): SessionPhase.OPEN,
        (ExchangeRequest, SessionPhase.TRAINING): SessionPhase.TRAINING,
        (StepEnd, SessionPhase.TRAINING): SessionPhase.TRAINING,
        (GradientRequest, SessionPhase.TRAINING): SessionPhase.TRAINING,
        (BackwardEnd, SessionPhase.TRAINING): SessionPhase.TRAINING,
        (SessionClosed, SessionPhase.CLOSING): SessionPhase.OVER,
        (ErrorReply, SessionPhase.OPENING): SessionPhase.OVER,
        (ErrorReply, SessionPhase.OPENING_TRAINING): SessionPhase.OVER,
        (ErrorReply, SessionPhase.OPEN): SessionPhase.OVER,
        (ErrorReply, SessionPhase.TRAINING): SessionPhase.OVER,
        (ErrorReply, SessionPhase.CLOSING): SessionPhase.OVER,
    },
}

# The same of a step; its session says who may. StepBegin and TrainBegin make it, FORWARD. One that
# is for no backward pass is OVER where this says KEPT.
STEP_TABLE: dict[tuple[type[Message], StepPhase], StepPhase] = {
    (ExchangeRequest, StepPhase.FORWARD): StepPhase.FORWARD_WAITING,
    (ExchangeReply, StepPhase.FORWARD_WAITING): StepPhase.FORWARD,
    (StepEnd, StepPhase.FORWARD): StepPhase.KEPT,
    (DropStep, StepPhase.KEPT): StepPhase.OVER,
    (BackwardBegin, StepPhase.KEPT): StepPhase.BACKWARD,
    (GradientRequest, StepPhase.BACKWARD): StepPhase.BACKWARD_WAITING,
    (GradientReply, StepPhase.BACKWARD_WAITING): StepPhase.BACKWARD,
    (BackwardEnd, StepPhase.BACKWARD): StepPhase.OVER,
}

# What can be on its way when an end has just said its last word: to an edge whose session is
# CLOSING, and to a cloud that ended a session by ErrorReply.
LATE: dict[Role, frozenset[type[Message]]] = {
    Role.EDGE: frozenset({SessionOpened, ExchangeRequest, StepEnd, GradientRequest, BackwardEnd}),
    Role.CLOUD: frozenset(
        {
            StepBegin,
            ExchangeReply,
            TrainBegin,
            BackwardBegin,
            GradientReply,
            DropStep,
            CloseSession,
            ErrorReply,
        }
    ),
}
