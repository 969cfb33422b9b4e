"""Two ends of a connection and the frames on their way between them."""

from __future__ import annotations

from collections import deque

from privatelora.runtime.wire.messages import (
    ExchangeReply,
    ExchangeRequest,
    Message,
    OpenSession,
    OutputRows,
    Role,
    SessionOpened,
    StepBegin,
    StepEnd,
)
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.runtime.wire.state import Phase, WireConnection
from tests.wire.samples import CLOUD_HELLO, EDGE_HELLO, payload

Z = payload()


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


def begin(step_id: int, session_id: int = 1) -> StepBegin:
    return StepBegin(session_id, step_id, 0, OutputRows.LAST, payload(), None)


def request(step_id: int, point: int, session_id: int = 1) -> ExchangeRequest:
    return ExchangeRequest(session_id, step_id, point, Z)


def reply(step_id: int, point: int, session_id: int = 1) -> ExchangeReply:
    return ExchangeReply(session_id, step_id, point, Z)


def end(step_id: int, session_id: int = 1) -> StepEnd:
    return StepEnd(session_id, step_id, Z)
