"""Who may say what when."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from privatelora.errors import LocalProtocolError, RemoteProtocolError, VersionMismatch
from privatelora.runtime.wire.messages import (
    CloseSession,
    ErrorCode,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    Hello,
    Message,
    OpenSession,
    OutputRows,
    Ping,
    Pong,
    Role,
    SessionClosed,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.runtime.wire.prelude import MAX_PINGS, MAX_SESSIONS, WireLimits
from privatelora.runtime.wire.rules import Phase, SessionPhase
from privatelora.runtime.wire.state import WireConnection
from tests.wire.ends import Ends, begin, end, greeted, reply, request, with_session
from tests.wire.samples import CLOUD_HELLO, EDGE_HELLO, frame_of, payload

FAILED = ErrorReply(ErrorCode.REQUEST, "no", 1)
GOODBYE = ErrorReply(ErrorCode.INTERNAL, "no more")


def test_a_whole_conversation() -> None:
    ends = greeted()
    ends.edge_tells(OpenSession(1, 64, "fp16", "fp16"))
    ends.edge_tells(OpenSession(5, 64, "fp16", "fp16"))
    ends.cloud_tells(SessionOpened(5, 64))
    ends.cloud_tells(SessionOpened(1, 64))
    ends.edge_tells(begin(0))
    ends.edge_tells(begin(3))
    ends.edge_tells(begin(0, session_id=5))
    ends.cloud_tells(request(0, 2))
    ends.cloud_tells(request(0, 0, session_id=5))
    ends.cloud_tells(request(3, 2))
    ends.edge_tells(reply(3, 2))
    ends.edge_tells(reply(0, 2))
    ends.cloud_tells(request(0, 9))
    ends.edge_tells(reply(0, 9))
    ends.cloud_tells(end(3))
    assert ends.edge.steps(1) == ends.cloud.steps(1) == (0,)
    ends.cloud_tells(end(0))
    ends.edge_tells(CloseSession(1))
    ends.cloud_tells(SessionClosed(1))
    assert ends.edge.sessions == ends.cloud.sessions == {5: SessionPhase.OPEN}
    ends.edge_tells(CloseSession(5))
    ends.cloud_tells(ErrorReply(ErrorCode.INTERNAL, "could not tidy up", 5))
    assert ends.edge.sessions == ends.cloud.sessions == {}
    ends.edge_tells(GOODBYE)
    assert ends.phases() == (Phase.ENDED, Phase.ENDED)


# The tables, said again: who may say what. Everything else is refused at both ends.

ONE_OF_EACH: dict[Role, tuple[Message, ...]] = {
    Role.EDGE: (
        EDGE_HELLO,
        OpenSession(2, 64, "fp16", "fp16"),
        OpenSession(1, 64, "fp16", "fp16"),
        begin(7),
        reply(6, 4),
        CloseSession(1),
        Ping(3),
        FAILED,
        GOODBYE,
    ),
    Role.CLOUD: (
        CLOUD_HELLO,
        SessionOpened(1, 64),
        request(6, 5),
        end(5),
        SessionClosed(1),
        Pong(3),
    ),
}
ALL = (*ONE_OF_EACH[Role.EDGE], *ONE_OF_EACH[Role.CLOUD])


def new() -> Ends:
    return Ends()


def hello_said() -> Ends:
    ends = Ends()
    ends.edge_tells(EDGE_HELLO)
    return ends


def pinged() -> Ends:
    ends = greeted()
    ends.edge_tells(Ping(3))
    return ends


def opening() -> Ends:
    ends = greeted()
    ends.edge_tells(OpenSession(1, 64, "fp16", "fp16"))
    return ends


def running() -> Ends:
    """Step 5 may end or ask; step 6 waits for point 4."""
    ends = with_session()
    ends.edge_tells(begin(5))
    ends.edge_tells(begin(6))
    ends.cloud_tells(request(6, 4))
    return ends


def closing() -> Ends:
    ends = running()
    ends.edge_tells(CloseSession(1))
    return ends


def over() -> Ends:
    ends = closing()
    ends.cloud_tells(SessionClosed(1))
    return ends


def ended_by_edge() -> Ends:
    ends = running()
    ends.edge_tells(GOODBYE)
    return ends


def ended_by_cloud() -> Ends:
    ends = running()
    ends.cloud_tells(GOODBYE)
    return ends


LEGAL = {
    (new, Role.EDGE): (Hello,),
    (new, Role.CLOUD): (GOODBYE,),
    (hello_said, Role.EDGE): (GOODBYE,),
    (hello_said, Role.CLOUD): (Hello, GOODBYE),
    (greeted, Role.EDGE): (OpenSession, Ping, GOODBYE),
    (greeted, Role.CLOUD): (GOODBYE,),
    (pinged, Role.EDGE): (OpenSession, GOODBYE),
    (pinged, Role.CLOUD): (Pong, GOODBYE),
    (opening, Role.EDGE): (ALL[1], CloseSession, Ping, FAILED, GOODBYE),
    (opening, Role.CLOUD): (SessionOpened, FAILED, GOODBYE),
    (running, Role.EDGE): (ALL[1], StepBegin, ExchangeReply, CloseSession, Ping, FAILED, GOODBYE),
    (running, Role.CLOUD): (StepEnd, FAILED, GOODBYE),
    (closing, Role.EDGE): (ALL[1], Ping, GOODBYE),
    (closing, Role.CLOUD): (SessionClosed, FAILED, GOODBYE),
    (over, Role.EDGE): (ALL[1], Ping, GOODBYE),
    (over, Role.CLOUD): (GOODBYE,),
    (ended_by_edge, Role.EDGE): (),
    (ended_by_edge, Role.CLOUD): (),
    (ended_by_cloud, Role.EDGE): (),
    (ended_by_cloud, Role.CLOUD): (),
}


@pytest.mark.parametrize(
    ("prepare", "sender", "message"),
    [(prepare, sender, message) for prepare, sender in LEGAL for message in ALL],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_what_each_end_may_say(prepare, sender, message) -> None:  # type: ignore[no-untyped-def]
    legal = any(
        message == allowed or (type(message) is allowed) for allowed in LEGAL[prepare, sender]
    )
    ends = prepare()
    speaker, listener = (ends.edge, ends.cloud) if sender is Role.EDGE else (ends.cloud, ends.edge)
    before = speaker.phase, speaker.sessions, speaker.steps(1)
    if legal and not (isinstance(message, Hello) and message.role is not sender):
        frame = memoryview(bytearray(b"".join(speaker.send(message))))
        assert listener.receive(frame) == message
        return
    with pytest.raises(LocalProtocolError) as local:
        speaker.send(message)
    assert len(str(local.value).splitlines()) == 1
    assert (speaker.phase, speaker.sessions, speaker.steps(1)) == before

    # The same from a peer that does not keep the rules.
    listener_ended_it = (prepare, sender) in (
        (ended_by_edge, Role.CLOUD),
        (ended_by_cloud, Role.EDGE),
    )
    late = prepare is closing and sender is Role.CLOUD
    if listener_ended_it or (
        late and isinstance(message, SessionOpened | ExchangeRequest | StepEnd)
    ):
        assert listener.receive(frame_of(message)) is None
        return
    with pytest.raises(RemoteProtocolError) as remote:
        listener.receive(frame_of(message))
    assert len(str(remote.value).splitlines()) == 1


# Steps

WRONG_STEPS: list[tuple[list[Message], Message]] = [
    ([begin(3)], begin(3)),
    ([begin(3)], begin(2)),
    ([begin(3), end(3)], begin(3)),
    ([], request(0, 0)),
    ([begin(0)], request(1, 0)),
    ([begin(0), request(0, 1)], request(0, 2)),
    ([begin(0), request(0, 1), reply(0, 1)], request(0, 1)),
    ([begin(0), request(0, 1), reply(0, 1)], request(0, 0)),
    ([begin(0), end(0)], request(0, 0)),
    ([begin(0)], reply(0, 0)),
    ([begin(0), request(0, 1)], reply(0, 0)),
    ([begin(0), request(0, 1)], reply(0, 2)),
    ([begin(0), request(0, 1), reply(0, 1)], reply(0, 1)),
    ([begin(0), begin(1), request(0, 1)], reply(1, 1)),
    ([begin(0), request(0, 1)], reply(0, 1, session_id=2)),
    ([begin(0), request(0, 1)], end(0)),
    ([begin(0), end(0)], end(0)),
    ([], end(0)),
    ([begin(0)], end(1)),
]


@pytest.mark.parametrize(("said", "wrong"), WRONG_STEPS, ids=lambda value: None)
def test_steps_follow_the_rules(said: list[Message], wrong: Message) -> None:
    ends = with_session()
    from_edge = (StepBegin, ExchangeReply)
    for message in said:
        (ends.edge_tells if isinstance(message, from_edge) else ends.cloud_tells)(message)
    speaker, listener = (
        (ends.edge, ends.cloud) if isinstance(wrong, from_edge) else (ends.cloud, ends.edge)
    )
    with pytest.raises(LocalProtocolError):
        speaker.send(wrong)
    with pytest.raises(RemoteProtocolError, match=r"step|session|ids"):
        listener.receive(frame_of(wrong))


def test_what_is_refused_to_be_sent_changes_nothing() -> None:
    ends = running()
    with pytest.raises(LocalProtocolError):
        ends.edge.send(reply(6, 3))
    ends.edge_tells(reply(6, 4))
    with pytest.raises(LocalProtocolError):  # cannot be encoded
        ends.edge.send(StepBegin(1, 7, 0, OutputRows.LAST, payload(0), None))
    ends.edge_tells(begin(7))


# Round trips


def test_pings_are_answered_in_their_order() -> None:
    ends = running()
    for nonce in (0, 5, 6):
        ends.edge_tells(Ping(nonce))
    with pytest.raises(LocalProtocolError, match="Ping 6 after 6: nonces must ascend"):
        ends.edge.send(Ping(6))
    ends.cloud_tells(Pong(0))
    with pytest.raises(LocalProtocolError, match="Pong 6 is not the answer"):
        ends.cloud.send(Pong(6))
    for nonce in (5, 6):
        ends.cloud_tells(Pong(nonce))
    with pytest.raises(RemoteProtocolError, match="Pong 6 is not the answer"):
        ends.edge.receive(frame_of(Pong(6)))


def test_pings_that_wait_are_limited() -> None:
    ends = greeted()
    for nonce in range(MAX_PINGS):
        ends.edge_tells(Ping(nonce))
    with pytest.raises(LocalProtocolError, match=f"Ping with {MAX_PINGS} not yet answered"):
        ends.edge.send(Ping(9))
    with pytest.raises(RemoteProtocolError, match=f"Ping with {MAX_PINGS} not yet answered"):
        ends.cloud.receive(frame_of(Ping(9)))


# The end of a session


@pytest.mark.parametrize("last_word", [CloseSession(1), FAILED], ids=["close", "error"])
@pytest.mark.parametrize("answer", [SessionClosed(1), FAILED], ids=["closed", "error"])
def test_what_was_on_its_way_to_a_closing_edge_is_dropped(
    last_word: Message, answer: Message
) -> None:
    ends = running()
    ends.cloud_says(request(5, 0))
    ends.edge_says(last_word)
    assert ends.edge_hears() is None
    assert ends.cloud_hears() == last_word
    assert ends.edge.steps(1) == ends.cloud.steps(1) == ()
    ends.cloud_tells(answer)
    assert ends.edge.sessions == ends.cloud.sessions == {}
    with pytest.raises(RemoteProtocolError):
        ends.edge.receive(frame_of(answer))


def test_a_session_may_be_closed_before_it_is_open() -> None:
    ends = greeted()
    ends.edge_tells(OpenSession(1, 64, "fp16", "fp16"))
    ends.cloud_says(SessionOpened(1, 64))
    ends.edge_says(CloseSession(1))
    assert ends.edge_hears() is None
    assert ends.cloud_hears() == CloseSession(1)
    ends.cloud_tells(SessionClosed(1))
    with pytest.raises(LocalProtocolError, match="ascend"):
        ends.edge.send(OpenSession(1, 64, "fp16", "fp16"))


@pytest.mark.parametrize("last_word", [CloseSession(1), FAILED], ids=["close", "error"])
def test_what_was_on_its_way_to_a_failing_cloud_is_dropped(last_word: Message) -> None:
    ends = running()
    for message in (begin(7), reply(6, 4), last_word):
        ends.edge_says(message)
    ends.cloud_says(FAILED)
    assert [ends.cloud_hears() for _ in range(3)] == [None, None, None]
    assert ends.edge_hears() == FAILED
    assert ends.edge.sessions == ends.cloud.sessions == {}
    with pytest.raises(RemoteProtocolError, match="does not exist"):
        ends.cloud.receive(frame_of(begin(8)))


def test_a_refused_session_leaves_the_others_alone() -> None:
    ends = running()
    ends.edge_tells(OpenSession(2, 64, "fp16", "fp16"))
    ends.cloud_tells(ErrorReply(ErrorCode.CAPACITY, "full", 2))
    ends.edge_tells(reply(6, 4))
    with pytest.raises(LocalProtocolError):
        ends.edge.send(begin(0, session_id=2))


def test_the_cloud_remembers_as_many_failures_as_the_edge_can_still_talk_about() -> None:
    ends = greeted()
    sessions = range(MAX_SESSIONS)
    for session_id in sessions:
        ends.edge_tells(OpenSession(session_id, 64, "fp16", "fp16"))
    for session_id in sessions:
        ends.edge_says(CloseSession(session_id))
    for session_id in sessions:
        ends.cloud_says(ErrorReply(ErrorCode.CAPACITY, "full", session_id))
    assert [ends.cloud_hears() for _ in sessions] == [None for _ in sessions]
    assert [type(ends.edge_hears()) for _ in sessions] == [ErrorReply for _ in sessions]


# Limits


def test_sessions_are_limited() -> None:
    ends = greeted(WireLimits(max_sessions=2))
    ends.edge_tells(OpenSession(0, 64, "fp16", "fp16"))
    ends.edge_tells(OpenSession(1, 64, "fp16", "fp16"))
    with pytest.raises(LocalProtocolError, match="limit is 2"):
        ends.edge.send(OpenSession(2, 64, "fp16", "fp16"))
    ends.cloud_tells(FAILED)
    ends.edge_tells(OpenSession(2, 64, "fp16", "fp16"))
    with pytest.raises(RemoteProtocolError, match="limit is 2"):
        ends.cloud.receive(frame_of(OpenSession(3, 64, "fp16", "fp16")))


def test_steps_in_flight_are_limited() -> None:
    ends = with_session(limits=WireLimits(max_steps=2))
    ends.edge_tells(begin(0))
    ends.edge_tells(begin(1))
    with pytest.raises(LocalProtocolError, match="limit is 2"):
        ends.edge.send(begin(2))
    ends.cloud_tells(end(1))
    ends.edge_tells(begin(2))
    with pytest.raises(RemoteProtocolError, match="limit is 2"):
        ends.cloud.receive(frame_of(begin(3)))


def test_a_frame_too_large_for_the_peer_is_not_sent() -> None:
    ends = with_session()
    largest = CLOUD_HELLO.max_frame_nbytes - 100  # the sizes of its header and checksum
    for nbytes in (largest + 1, largest):
        message = dataclasses.replace(
            begin(0), hidden_states=TensorPayload("fp16", (1, 1), bytes(nbytes))
        )
        if nbytes > largest:
            with pytest.raises(LocalProtocolError, match=f"cloud accepts {2**21}"):
                ends.edge.send(message)
        else:
            ends.edge_tells(message)


# The end of a connection


@pytest.mark.parametrize(
    "frame", [b"", b"GET / HTTP/1.1\r\n", bytes(frame_of(begin(0)))[:-1], bytes(frame_of(end(9)))]
)
def test_after_a_breach_only_its_reason_can_be_said(frame: bytes) -> None:
    ends = running()
    with pytest.raises(RemoteProtocolError):
        ends.cloud.receive(memoryview(frame))
    assert ends.phases() == (Phase.ACTIVE, Phase.BROKEN)
    with pytest.raises(RemoteProtocolError):
        ends.cloud.receive(frame_of(begin(7)))
    for message in (end(5), FAILED):
        with pytest.raises(LocalProtocolError):
            ends.cloud.send(message)
    ends.cloud_tells(GOODBYE)
    assert ends.phases() == (Phase.ENDED, Phase.ENDED)
    with pytest.raises(LocalProtocolError):
        ends.cloud.send(GOODBYE)


def test_the_cloud_can_say_that_versions_differ() -> None:
    ends = Ends()
    with pytest.raises(VersionMismatch, match="version 8"):
        ends.cloud.receive(memoryview(struct.pack("<BBHI8s", 1, 0, 8, 99, b"PrivLoRA")))
    ends.edge.send(EDGE_HELLO)
    ends.cloud_tells(ErrorReply(ErrorCode.VERSION, "this cloud speaks version 1"))


def test_the_edge_understands_that_from_a_cloud_of_another_version() -> None:
    edge = WireConnection(Role.EDGE, WireLimits())
    edge.send(EDGE_HELLO)
    with pytest.raises(VersionMismatch, match="version 8"):
        edge.receive(memoryview(struct.pack("<BBHI8s", 2, 0, 8, 99, b"PrivLoRA")))


@pytest.mark.parametrize("role", Role)
def test_two_ends_of_one_role(role: Role) -> None:
    hello = EDGE_HELLO if role is Role.EDGE else CLOUD_HELLO
    listener = WireConnection(role, WireLimits())
    if role is Role.EDGE:
        listener.send(EDGE_HELLO)
    with pytest.raises(RemoteProtocolError, match=f"as {role}"):
        listener.receive(frame_of(hello))


def test_what_comes_after_this_end_said_goodbye_is_dropped() -> None:
    ends = running()
    ends.cloud_says(end(5))
    ends.cloud_says(GOODBYE)
    ends.edge_says(GOODBYE)
    assert ends.edge.sessions == {}
    assert ends.edge_hears() is None
    assert ends.edge_hears() is None
    assert ends.cloud_hears() is None
