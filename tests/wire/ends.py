"""Two ends of a connection and the frames on their way between them."""

from __future__ import annotations

from collections import deque

import pytest

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    BatchSequence,
    DropStep,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    Message,
    OpenSession,
    OutputRows,
    Role,
    SessionOpened,
    StepBegin,
    StepEnd,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.runtime.wire.rules import Phase
from privatelora.runtime.wire.state import WireConnection
from tests.wire.samples import CLOUD_HELLO, EDGE_HELLO, frame_of, payload

Z = payload()
FROM_EDGE = (StepBegin, ExchangeReply, TrainBegin, BackwardBegin, GradientReply, DropStep)
"""What an edge says of steps."""


class Ends:
    """An edge and a cloud; what one says waits until it is delivered to the other."""

    def __init__(self, limits: WireLimits | None = None) -> None:
        self.edge = WireConnection(Role.EDGE, limits or WireLimits())
        self.cloud = WireConnection(Role.CLOUD, limits or WireLimits())
        self.to_cloud: deque[memoryview] = deque()
        self.to_edge: deque[memoryview] = deque()

    def phases(self) -> tuple[Phase, Phase]:
        return self.edge.phase, self.cloud.phase

    def edge_says(self, message: Message) -> None:
        self.to_cloud.append(memoryview(bytearray(b"".join(self.edge.send(message)))))

    def cloud_says(self, message: Message) -> None:
        self.to_edge.append(memoryview(bytearray(b"".join(self.cloud.send(message)))))

    def cloud_hears(self) -> Message | None:
        return self.cloud.receive(self.to_cloud.popleft())

    def edge_hears(self) -> Message | None:
        return self.edge.receive(self.to_edge.popleft())

    def edge_tells(self, message: Message) -> None:
        """Say and hear at once."""
        self.edge_says(message)
        assert self.cloud_hears() == message

    def cloud_tells(self, message: Message) -> None:
        self.cloud_says(message)
        assert self.edge_hears() == message


def tell(ends: Ends, *messages: Message) -> None:
    """Say and hear each, by whoever says such a thing of a step."""
    for message in messages:
        (ends.edge_tells if isinstance(message, FROM_EDGE) else ends.cloud_tells)(message)


def require_refused(ends: Ends, sender: Role, message: Message, reason: str | None = None) -> None:
    """``sender`` may not say it, and the other end does not put up with it, for one reason."""
    speaker, listener = (ends.edge, ends.cloud) if sender is Role.EDGE else (ends.cloud, ends.edge)
    before = speaker.phase, speaker.sessions, speaker.steps(1)
    with pytest.raises(LocalProtocolError, match=reason) as local:
        speaker.send(message)
    assert len(str(local.value).splitlines()) == 1
    assert (speaker.phase, speaker.sessions, speaker.steps(1)) == before
    with pytest.raises(RemoteProtocolError, match=reason) as remote:
        listener.receive(frame_of(message))
    assert str(remote.value) == str(local.value)
    assert listener.phase is Phase.BROKEN


def greeted(limits: WireLimits | None = None) -> Ends:
    ends = Ends(limits)
    ends.edge_tells(EDGE_HELLO)
    ends.cloud_tells(CLOUD_HELLO)
    return ends


def with_session(session_id: int = 1, limits: WireLimits | None = None) -> Ends:
    ends = greeted(limits)
    ends.edge_tells(OpenSession(session_id, 64, "fp16", "fp16"))
    ends.cloud_tells(SessionOpened(session_id, 64))
    return ends


def with_training_session(session_id: int = 1, limits: WireLimits | None = None) -> Ends:
    ends = greeted(limits)
    ends.edge_tells(OpenSession(session_id, 64, "fp16", "fp16", training=True))
    ends.cloud_tells(SessionOpened(session_id, 64))
    return ends


def begin(step_id: int, session_id: int = 1) -> StepBegin:
    return StepBegin(session_id, step_id, 0, OutputRows.LAST, payload(), None)


def request(step_id: int, point: int, session_id: int = 1) -> ExchangeRequest:
    return ExchangeRequest(session_id, step_id, point, Z)


def reply(step_id: int, point: int, session_id: int = 1) -> ExchangeReply:
    return ExchangeReply(session_id, step_id, point, Z)


def end(step_id: int, session_id: int = 1) -> StepEnd:
    return StepEnd(session_id, step_id, Z)


def train(step_id: int, session_id: int = 1, *, backward: bool = True) -> TrainBegin:
    return TrainBegin(session_id, step_id, (BatchSequence(1, 1),), backward, payload(), None)


def go_back(step_id: int, session_id: int = 1) -> BackwardBegin:
    return BackwardBegin(session_id, step_id, Z)


def ask_back(step_id: int, point: int, session_id: int = 1) -> GradientRequest:
    return GradientRequest(session_id, step_id, point, Z)


def answer_back(step_id: int, point: int, session_id: int = 1) -> GradientReply:
    return GradientReply(session_id, step_id, point, Z)


def end_back(step_id: int, session_id: int = 1) -> BackwardEnd:
    return BackwardEnd(session_id, step_id, Z, None)


def drop(step_id: int, session_id: int = 1) -> DropStep:
    return DropStep(session_id, step_id)
