"""What every frame starts with, and what it may say of itself. The layout is in ``codec.py``."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from privatelora.errors import RemoteProtocolError
from privatelora.runtime.wire.messages import (
    PROTOCOL_VERSION,
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
    OpenSession,
    Ping,
    Pong,
    SessionClosed,
    SessionOpened,
    StepBegin,
    StepEnd,
    TrainBegin,
)

PRELUDE = struct.Struct("<BBHI")
ID_BITS = 53
"""Ids fit every JSON and floating-point reader: 0 <= id < 2**53."""
MAX_SESSIONS = 1024
"""Sessions that an edge may have on one connection and that are not over for it."""
MAX_STEPS = 64
"""Steps that may be in flight in one session."""
MAX_TRAINING_STEPS = 2
"""The same in a session for training, where a step ends with its backward pass: the edge may begin
a batch while the one before it is on its way back. Each takes memory for all its rows."""
MAX_SEQUENCES = 4096
"""In the batch of one TrainBegin."""
MAX_PINGS = 8
"""Pings that may wait for their Pongs."""
TYPES: dict[type[Message], int] = {
    Hello: 1,
    ErrorReply: 2,
    OpenSession: 3,
    SessionOpened: 4,
    CloseSession: 5,
    SessionClosed: 6,
    Ping: 7,
    Pong: 8,
    DropStep: 9,
    StepBegin: 16,
    ExchangeRequest: 17,
    ExchangeReply: 18,
    StepEnd: 19,
    TrainBegin: 20,
    BackwardBegin: 21,
    GradientRequest: 22,
    GradientReply: 23,
    BackwardEnd: 24,
}


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Bounds one end puts on what its peer may say; the frame's size is the transport's.

    ``max_sessions`` (per connection) and ``max_steps`` or ``max_training_steps`` (in flight, per
    session) guard memory: a peer that exceeds them loses the connection. Capacity is shared out by
    ErrorReply.
    """

    max_rows: int = 2**20
    max_features: int = 2**20
    max_sessions: int = MAX_SESSIONS
    max_steps: int = MAX_STEPS
    max_training_steps: int = MAX_TRAINING_STEPS


class MalformedError(Exception):
    """A header breaks the format; the codec says whose fault it is."""


def check_prelude(frame: memoryview, kind: type[Message], expected_nbytes: int) -> None:
    """Raise RemoteProtocolError unless the prelude is that of a ``kind`` with such a header."""
    _, flags, version, header_nbytes = PRELUDE.unpack_from(frame)
    if version != PROTOCOL_VERSION:
        raise RemoteProtocolError(
            f"{kind.__name__} of protocol version {version} on a connection of version "
            f"{PROTOCOL_VERSION}"
        )
    if flags:
        raise RemoteProtocolError(f"{kind.__name__} with flags {flags:#x}, which are reserved")
    if header_nbytes != expected_nbytes:
        raise RemoteProtocolError(
            f"{kind.__name__} declares a header of {header_nbytes} bytes where it has "
            f"{expected_nbytes}"
        )
