"""Who may say what when in a session for training."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from privatelora.errors import LocalProtocolError
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    CloseSession,
    DropStep,
    ErrorCode,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    Message,
    OpenSession,
    Role,
    SessionClosed,
    SessionOpened,
    StepBegin,
    StepEnd,
    TrainBegin,
)
from privatelora.runtime.wire.rules import SessionPhase
from tests.wire.ends import (
    FROM_EDGE,
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


def test_a_whole_conversation() -> None:
    ends = greeted()
    ends.edge_tells(OPEN)
    assert ends.edge.sessions == ends.cloud.sessions == {1: SessionPhase.OPENING_TRAINING}
    ends.cloud_tells(SessionOpened(1, 64))
    assert ends.edge.sessions == ends.cloud.sessions == {1: SessionPhase.TRAINING}
    tell(ends, train(0), request(0, 1), reply(0, 1), request(0, 4), reply(0, 4), end(0))
    assert ends.edge.steps(1) == ends.cloud.steps(1) == (0,)
    tell(ends, go_back(0), ask_back(0, 4), answer_back(0, 4), ask_back(0, 1), answer_back(0, 1))
    tell(ends, end_back(0))
    assert ends.edge.steps(1) == ends.cloud.steps(1) == ()
    ends.edge_tells(CloseSession(1))
    ends.cloud_tells(SessionClosed(1))
    assert ends.edge.sessions == ends.cloud.sessions == {}


def test_a_batch_may_begin_while_another_is_on_its_way_back() -> None:
    ends = with_training_session()
    tell(ends, train(0), end(0), go_back(0), ask_back(0, 3))
    tell(ends, train(1), request(1, 3), answer_back(0, 3), reply(1, 3), ask_back(0, 0))
    tell(ends, end(1), go_back(1), ask_back(1, 3), answer_back(0, 0), end_back(0))
    tell(ends, train(2), answer_back(1, 3), end_back(1), end(2), drop(2))
    assert ends.edge.steps(1) == ends.cloud.steps(1) == ()


def test_training_goes_on_beside_a_conversation() -> None:
    ends = with_training_session()
    ends.edge_tells(OpenSession(2, 64, "fp16", "fp16"))
    ends.cloud_tells(SessionOpened(2, 64))
    tell(ends, train(0), begin(0, session_id=2), request(0, 5), request(0, 5, session_id=2))
    tell(ends, reply(0, 5, session_id=2), end(0, session_id=2), reply(0, 5), end(0), go_back(0))
    assert ends.edge.steps(2) == ends.cloud.steps(2) == ()
    assert ends.edge.steps(1) == ends.cloud.steps(1) == (0,)


def test_the_plan_may_have_no_points_on_the_wire() -> None:
    ends = with_training_session()
    tell(ends, train(0), end(0), go_back(0), end_back(0))
    tell(ends, train(1, backward=False), end(1))


# The tables, said again: who may say what. Everything else is refused at both ends.

ALL: dict[Role, tuple[Message, ...]] = {
    Role.EDGE: (
        OPEN,
        begin(7),
        train(7),
        reply(5, 4),
        go_back(5),
        answer_back(5, 4),
        drop(5),
        CloseSession(1),
        FAILED,
    ),
    Role.CLOUD: (
        SessionOpened(1, 64),
        request(5, 5),
        end(5),
        ask_back(5, 3),
        end_back(5),
        SessionClosed(1),
        FAILED,
    ),
}


def opening() -> Ends:
    ends = greeted()
    ends.edge_tells(OPEN)
    return ends


def idle() -> Ends:
    return with_training_session()


def forward() -> Ends:
    ends = idle()
    tell(ends, train(5))
    return ends


def forward_waiting() -> Ends:
    ends = forward()
    tell(ends, request(5, 4))
    return ends


def kept() -> Ends:
    ends = forward_waiting()
    tell(ends, reply(5, 4), end(5))
    return ends


def backward() -> Ends:
    ends = kept()
    tell(ends, go_back(5))
    return ends


def backward_waiting() -> Ends:
    ends = backward()
    tell(ends, ask_back(5, 4))
    return ends


def forward_only_over() -> Ends:
    ends = idle()
    tell(ends, train(5, backward=False), end(5))
    return ends


def dropped() -> Ends:
    ends = kept()
    tell(ends, drop(5))
    return ends


def back() -> Ends:
    ends = backward()
    tell(ends, end_back(5))
    return ends


def conversation() -> Ends:
    """In a session that is not for training."""
    ends = with_session()
    tell(ends, begin(5))
    return ends


def conversation_waiting() -> Ends:
    ends = conversation()
    tell(ends, request(5, 4))
    return ends


def closing() -> Ends:
    ends = backward_waiting()
    ends.edge_tells(CloseSession(1))
    return ends


def over() -> Ends:
    ends = closing()
    ends.cloud_tells(SessionClosed(1))
    return ends


LEGAL: dict[Callable[[], Ends], tuple[type[Message], ...]] = {
    opening: (SessionOpened,),
    idle: (TrainBegin,),
    forward: (TrainBegin, ExchangeRequest, StepEnd),
    forward_waiting: (TrainBegin, ExchangeReply),
    kept: (TrainBegin, BackwardBegin, DropStep),
    backward: (TrainBegin, GradientRequest, BackwardEnd),
    backward_waiting: (TrainBegin, GradientReply),
    forward_only_over: (TrainBegin,),
    dropped: (TrainBegin,),
    back: (TrainBegin,),
    conversation: (StepBegin, ExchangeRequest, StepEnd),
    conversation_waiting: (StepBegin, ExchangeReply),
    closing: (SessionClosed,),
    over: (),
}
LATE = (SessionOpened, ExchangeRequest, StepEnd, GradientRequest, BackwardEnd)


def is_legal(prepare: Callable[[], Ends], sender: Role, message: Message) -> bool:
    if isinstance(message, CloseSession | ErrorReply):
        # The cloud has to answer the edge's last word, which was the first of two.
        return prepare is not over and (prepare is not closing or sender is Role.CLOUD)
    return isinstance(message, LEGAL[prepare])


@pytest.mark.parametrize(
    ("prepare", "sender", "message"),
    [(prepare, sender, message) for prepare in LEGAL for sender in Role for message in ALL[sender]],
    ids=lambda value: str(
        getattr(value, "__name__", None) or getattr(value, "value", None) or type(value).__name__
    ),
)
def test_what_each_end_may_say(prepare: Callable[[], Ends], sender: Role, message: Message) -> None:
    ends = prepare()
    says, tells = (
        (ends.edge_says, ends.edge_tells)
        if sender is Role.EDGE
        else (ends.cloud_says, ends.cloud_tells)
    )
    if is_legal(prepare, sender, message):
        tells(message)
        assert ends.edge.sessions == ends.cloud.sessions
        assert ends.edge.steps(1) == ends.cloud.steps(1)
    elif prepare is closing and isinstance(message, LATE):
        with pytest.raises(LocalProtocolError):
            says(message)
        assert ends.edge.receive(frame_of(message)) is None
    else:
        require_refused(ends, sender, message)


@pytest.mark.parametrize("sender", Role)
def test_nobody_says_what_is_for_the_other_to_say(sender: Role) -> None:
    other = Role.CLOUD if sender is Role.EDGE else Role.EDGE
    for prepare in (forward, forward_waiting, kept, backward, backward_waiting):
        for message in ALL[other]:
            if not isinstance(message, ErrorReply | CloseSession):
                require_refused(prepare(), sender, message, f"the {sender} may not say")


# Steps

WRONG_STEPS: list[tuple[list[Message], Message, str]] = [
    # Ids
    ([train(3)], train(3), "ids must ascend"),
    ([train(3)], train(2), "ids must ascend"),
    ([train(3, backward=False), end(3)], train(3), "ids must ascend"),
    ([train(3), end(3), drop(3)], train(3), "ids must ascend"),
    ([train(3), end(3), go_back(3), end_back(3)], train(2), "ids must ascend"),
    ([train(0)], request(1, 0), "step 1 of session 1 is not in flight"),
    ([train(0), end(0)], go_back(1), "step 1 of session 1 is not in flight"),
    ([train(0), end(0), go_back(0)], ask_back(1, 0), "is not in flight"),
    ([train(0), end(0), go_back(0)], end_back(1), "is not in flight"),
    ([train(0), end(0)], drop(1), "is not in flight"),
    ([train(0), end(0)], go_back(0, session_id=2), "session 2, which does not exist"),
    ([train(0), end(0)], drop(0, session_id=2), "session 2, which does not exist"),
    # The order of a step
    ([train(0)], go_back(0), "is FORWARD"),
    ([train(0)], ask_back(0, 0), "is FORWARD"),
    ([train(0)], end_back(0), "is FORWARD"),
    ([train(0)], drop(0), "is FORWARD"),
    ([train(0), request(0, 1)], drop(0), "is FORWARD_WAITING"),
    ([train(0), request(0, 1)], end(0), "is FORWARD_WAITING"),
    ([train(0), request(0, 1)], answer_back(0, 1), "is FORWARD_WAITING"),
    ([train(0), end(0)], request(0, 1), "is KEPT"),
    ([train(0), end(0)], end(0), "is KEPT"),
    ([train(0), end(0)], ask_back(0, 1), "is KEPT"),
    ([train(0), end(0)], end_back(0), "is KEPT"),
    ([train(0), end(0), go_back(0)], go_back(0), "is BACKWARD"),
    ([train(0), end(0), go_back(0)], drop(0), "is BACKWARD"),
    ([train(0), end(0), go_back(0)], request(0, 9), "is BACKWARD"),
    ([train(0), end(0), go_back(0)], end(0), "is BACKWARD"),
    ([train(0), end(0), go_back(0), ask_back(0, 1)], end_back(0), "is BACKWARD_WAITING"),
    ([train(0), end(0), go_back(0), ask_back(0, 1)], drop(0), "is BACKWARD_WAITING"),
    ([train(0), end(0), go_back(0), ask_back(0, 1)], go_back(0), "is BACKWARD_WAITING"),
    ([train(0), end(0), go_back(0), ask_back(0, 1)], reply(0, 1), "is BACKWARD_WAITING"),
    ([train(0), end(0), go_back(0), ask_back(0, 1)], ask_back(0, 0), "is BACKWARD_WAITING"),
    ([train(0), end(0), go_back(0), end_back(0)], go_back(0), "is not in flight"),
    ([train(0), end(0), go_back(0), end_back(0)], end_back(0), "is not in flight"),
    ([train(0), end(0), drop(0)], go_back(0), "is not in flight"),
    ([train(0), end(0), drop(0)], drop(0), "is not in flight"),
    # Nothing is kept of a step that does not go back.
    ([train(0, backward=False), end(0)], go_back(0), "is not in flight"),
    ([train(0, backward=False), end(0)], drop(0), "is not in flight"),
    ([train(0, backward=False)], drop(0), "is FORWARD"),
    # Points ascend on the way forward and descend on the way back.
    ([train(0), request(0, 1), reply(0, 1)], request(0, 1), "last at point 1"),
    ([train(0), request(0, 1), reply(0, 1)], request(0, 0), "last at point 1"),
    ([train(0), request(0, 1)], reply(0, 2), "last at point 1"),
    ([train(0), end(0), go_back(0)], answer_back(0, 1), "not asked for any point yet"),
    ([train(0), end(0), go_back(0), ask_back(0, 2)], answer_back(0, 1), "last at point 2"),
    ([train(0), end(0), go_back(0), ask_back(0, 2)], answer_back(0, 3), "last at point 2"),
]
AT_2 = [train(0), end(0), go_back(0), ask_back(0, 2), answer_back(0, 2)]
WRONG_STEPS += [
    (AT_2, ask_back(0, 2), "for point 2: .* last at point 2"),
    (AT_2, ask_back(0, 3), "for point 3: .* last at point 2"),
    (AT_2, answer_back(0, 2), "is BACKWARD, last at point 2"),
    ([*AT_2, train(1), request(1, 2)], answer_back(1, 2), "step 1 .* is FORWARD_WAITING"),
]


@pytest.mark.parametrize(("said", "wrong", "reason"), WRONG_STEPS, ids=lambda value: None)
def test_steps_follow_the_rules(said: list[Message], wrong: Message, reason: str) -> None:
    ends = with_training_session()
    tell(ends, *said)
    sender = Role.EDGE if isinstance(wrong, FROM_EDGE) else Role.CLOUD
    require_refused(ends, sender, wrong, reason)


def test_the_way_back_may_begin_at_any_point() -> None:
    """Also beyond the last one on the way forward, and it need not stop at all of them."""
    ends = with_training_session()
    tell(ends, train(0), request(0, 3), reply(0, 3), end(0), go_back(0))
    for point in (7, 3, 0):
        tell(ends, ask_back(0, point), answer_back(0, point))
    tell(ends, end_back(0))


def test_what_is_refused_to_be_sent_changes_nothing() -> None:
    ends = backward_waiting()
    for wrong in (answer_back(5, 3), go_back(5), drop(5), train(5), begin(7)):
        with pytest.raises(LocalProtocolError):
            ends.edge.send(wrong)
    for wrong in (ask_back(5, 3), end_back(5), end(5)):
        with pytest.raises(LocalProtocolError):
            ends.cloud.send(wrong)
    tell(ends, answer_back(5, 4))
    with pytest.raises(LocalProtocolError):
        ends.cloud.send(ask_back(5, 4))
    tell(ends, ask_back(5, 3), answer_back(5, 3), end_back(5), train(6))
