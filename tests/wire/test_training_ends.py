"""How many training steps there may be at once, and what is on its way when their session ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.runtime.wire.messages import (
    CloseSession,
    ErrorCode,
    ErrorReply,
    Message,
    OpenSession,
    Role,
    SessionClosed,
    SessionOpened,
)
from privatelora.runtime.wire.prelude import MAX_TRAINING_STEPS, WireLimits
from privatelora.runtime.wire.rules import Phase, SessionPhase
from tests.wire.ends import (
    Ends,
    answer_back,
    ask_back,
    begin,
    drop,
    end,
    end_back,
    go_back,
    greeted,
    reply,
    request,
    require_refused,
    tell,
    train,
    with_session,
    with_training_session,
)
from tests.wire.samples import frame_of

FAILED = ErrorReply(ErrorCode.REQUEST, "no", 1)
GOODBYE = ErrorReply(ErrorCode.INTERNAL, "no more")
OPEN = OpenSession(1, 64, "fp16", "fp16", training=True)

each_last_word = pytest.mark.parametrize(
    "last_word", [CloseSession(1), FAILED], ids=["close", "error"]
)


# Limits


def full(limits: WireLimits | None = None) -> Ends:
    """As many steps as there may be."""
    ends = with_training_session(limits=limits)
    tell(ends, *(train(step_id) for step_id in range(MAX_TRAINING_STEPS)))
    return ends


@pytest.mark.parametrize("limits", [None, WireLimits(max_steps=1), WireLimits(max_steps=9)])
def test_training_steps_are_limited(limits: WireLimits | None) -> None:
    require_refused(full(limits), Role.EDGE, train(9), f"the limit is {MAX_TRAINING_STEPS}")


KEPT: list[Message] = [end(0)]
ON_ITS_WAY_BACK: list[Message] = [end(0), go_back(0), ask_back(0, 3)]


@pytest.mark.parametrize("said", [[], KEPT, ON_ITS_WAY_BACK], ids=["forward", "kept", "back"])
def test_a_training_step_counts_until_it_is_over(said: list[Message]) -> None:
    ends = full()
    tell(ends, *said)
    require_refused(ends, Role.EDGE, train(9), f"with {MAX_TRAINING_STEPS} steps in flight")


@pytest.mark.parametrize(
    "said",
    [[*KEPT, drop(0)], [*ON_ITS_WAY_BACK, answer_back(0, 3), end_back(0)]],
    ids=["dropped", "went back"],
)
def test_a_training_step_that_is_over_makes_room_for_one(said: list[Message]) -> None:
    ends = full()
    tell(ends, *said, train(9))
    assert ends.edge.steps(1) == ends.cloud.steps(1) == (1, 9)
    require_refused(ends, Role.EDGE, train(10), f"the limit is {MAX_TRAINING_STEPS}")


def test_a_step_that_does_not_go_back_makes_room_with_its_end() -> None:
    ends = with_training_session()
    for step_id in range(3 * MAX_TRAINING_STEPS):
        tell(ends, train(step_id, backward=False), end(step_id))
    assert ends.edge.steps(1) == ends.cloud.steps(1) == ()


def test_a_drop_and_the_next_step_are_said_in_one_breath() -> None:
    """Nothing answers a DropStep: the cloud has room as soon as it hears it."""
    ends = full()
    tell(ends, end(0), end(1))
    said: list[Message] = [drop(1), train(2), drop(0), train(3)]
    for message in said:
        ends.edge_says(message)
    assert [ends.cloud_hears() for _ in said] == said
    assert ends.edge.steps(1) == ends.cloud.steps(1) == (2, 3)


def test_the_limit_of_training_steps_is_for_each_session_and_for_no_conversation() -> None:
    limits = WireLimits(max_training_steps=1)
    ends = with_training_session(limits=limits)
    ends.edge_tells(OpenSession(2, 64, "fp16", "fp16", training=True))
    ends.cloud_tells(SessionOpened(2, 64))
    tell(ends, train(0), train(0, session_id=2))
    require_refused(ends, Role.EDGE, train(1), "the limit is 1")

    ends = with_session(limits=limits)
    tell(ends, begin(0), begin(1), begin(2))


def test_sessions_for_training_are_sessions() -> None:
    ends = with_training_session(limits=WireLimits(max_sessions=1))
    require_refused(
        ends, Role.EDGE, OpenSession(2, 64, "fp16", "fp16", training=True), "the limit is 1"
    )


# The end of a session: its edge says so


def test_a_session_for_training_may_be_closed_before_it_is_open() -> None:
    ends = greeted()
    ends.edge_tells(OPEN)
    ends.cloud_says(SessionOpened(1, 64))
    ends.edge_says(CloseSession(1))
    assert ends.edge_hears() is None
    assert ends.cloud_hears() == CloseSession(1)
    ends.cloud_tells(SessionClosed(1))
    assert ends.edge.sessions == ends.cloud.sessions == {}


def kept() -> Ends:
    ends = with_training_session()
    tell(ends, train(5), end(5))
    return ends


def on_its_way_back() -> Ends:
    ends = kept()
    tell(ends, go_back(5))
    return ends


def both_ways() -> Ends:
    ends = on_its_way_back()
    tell(ends, train(6))
    return ends


@each_last_word
@pytest.mark.parametrize("answer", [SessionClosed(1), FAILED], ids=["closed", "error"])
@pytest.mark.parametrize(
    ("prepare", "on_its_way"),
    [
        (both_ways, [request(6, 0), ask_back(5, 3)]),
        (both_ways, [end(6), end_back(5)]),
        (on_its_way_back, [ask_back(5, 3)]),
        (on_its_way_back, [end_back(5)]),
        (kept, []),
    ],
)
def test_what_was_on_its_way_to_a_closing_trainer_is_dropped(
    prepare: Callable[[], Ends], on_its_way: list[Message], answer: Message, last_word: Message
) -> None:
    ends = prepare()
    for message in on_its_way:
        ends.cloud_says(message)
    ends.edge_says(last_word)
    assert [ends.edge_hears() for _ in on_its_way] == [None for _ in on_its_way]
    assert ends.cloud_hears() == last_word
    assert ends.edge.steps(1) == ends.cloud.steps(1) == ()
    assert ends.edge.sessions == ends.cloud.sessions == {1: SessionPhase.CLOSING}
    ends.cloud_tells(answer)
    assert ends.edge.sessions == ends.cloud.sessions == {}
    for message in (ask_back(5, 3), end_back(5), end(6)):
        with pytest.raises(RemoteProtocolError, match=r"does not exist or is over|after its last"):
            ends.edge.receive(frame_of(message))


# Its cloud says so


def test_a_cloud_may_refuse_a_session_for_training() -> None:
    ends = greeted()
    ends.edge_tells(OPEN)
    ends.cloud_tells(FAILED)
    assert ends.edge.sessions == ends.cloud.sessions == {}
    with pytest.raises(LocalProtocolError, match="does not exist or is over"):
        ends.edge.send(train(0))


@each_last_word
@pytest.mark.parametrize(
    ("said", "on_its_way"),
    [
        ([train(5), request(5, 3)], [reply(5, 3), train(6)]),
        ([train(5), end(5)], [go_back(5), train(6)]),
        ([train(5), end(5)], [drop(5), train(6), train(7)]),
        ([train(5), end(5), go_back(5), ask_back(5, 3)], [answer_back(5, 3), train(6)]),
        ([], []),
    ],
)
def test_what_was_on_its_way_to_a_failing_cloud_is_dropped(
    said: list[Message], on_its_way: list[Message], last_word: Message
) -> None:
    ends = with_training_session()
    tell(ends, *said)
    on_its_way = [*on_its_way, last_word]
    for message in on_its_way:
        ends.edge_says(message)
    ends.cloud_says(FAILED)
    assert [ends.cloud_hears() for _ in on_its_way] == [None for _ in on_its_way]
    assert ends.edge_hears() == FAILED
    assert ends.edge.sessions == ends.cloud.sessions == {}
    # That was the edge's last word, and behind it nothing can have been on its way.
    with pytest.raises(RemoteProtocolError, match="does not exist or is over"):
        ends.cloud.receive(frame_of(drop(5)))


def test_a_trainer_that_was_refused_leaves_conversations_alone() -> None:
    ends = with_session()
    tell(ends, begin(0), request(0, 1))
    ends.edge_tells(OpenSession(2, 64, "fp16", "fp16", training=True))
    ends.cloud_tells(ErrorReply(ErrorCode.CAPACITY, "all are at work", 2))
    tell(ends, reply(0, 1), end(0))


# The end of a connection


def test_what_comes_after_this_end_said_goodbye_is_dropped() -> None:
    ends = both_ways()
    ends.cloud_says(ask_back(5, 3))
    ends.cloud_says(GOODBYE)
    ends.edge_says(GOODBYE)
    assert ends.edge_hears() is None
    assert ends.edge_hears() is None
    assert ends.cloud_hears() is None
    assert ends.phases() == (Phase.ENDED, Phase.ENDED)
    assert ends.edge.steps(1) == ends.cloud.steps(1) == ()


@pytest.mark.parametrize(
    "message", [train(0), go_back(0), answer_back(0, 0), drop(0)], ids=lambda m: type(m).__name__
)
def test_nothing_of_training_is_said_before_the_greeting(message: Message) -> None:
    require_refused(Ends(), Role.EDGE, message, "on a connection that is NEW")
