"""Conversations of a trainer with its cloud, to be recorded."""

from __future__ import annotations

from privatelora.runtime.wire.messages import (
    CloseSession,
    DropStep,
    ErrorCode,
    ErrorReply,
    OpenSession,
    SessionClosed,
    SessionOpened,
)
from tests.fuzz.conversations import PROMPT_ROWS, Conversation
from tests.fuzz.end import MAX_POSITIONS


def training(ends: Conversation) -> None:
    """One step forward and back, one forward only, two at a time, one that is dropped."""
    ends.greet()
    ends.open_training(1)
    ends.edge_tells(ends.train(1, 0, (3, 1), (2, 2)))
    for point in (0, 2):
        ends.cloud_tells(ends.request(1, 0, point, 5))
        ends.edge_tells(ends.reply(1, 0, point, 5))
    ends.cloud_tells(ends.end(1, 0, 3))
    ends.edge_tells(ends.go_back(1, 0, 3))
    for point in (2, 0):
        ends.cloud_tells(ends.ask_back(1, 0, point, 5))
        ends.edge_tells(ends.answer_back(1, 0, point, 5))
    ends.cloud_tells(ends.end_back(1, 0, 5))
    ends.edge_tells(ends.train(1, 1, (2, 0), backward=False, opening=False))
    ends.cloud_tells(ends.end(1, 1, 0))
    ends.edge_tells(ends.train(1, 2, (1, 1), opening=False))
    ends.cloud_tells(ends.end(1, 2, 1))
    ends.edge_tells(ends.go_back(1, 2, 1))
    ends.edge_tells(ends.train(1, 4, (1, 1), (1, 1), (1, 0)))
    ends.cloud_tells(ends.ask_back(1, 2, 3, 1))
    ends.cloud_tells(ends.request(1, 4, 1, 3))
    ends.edge_tells(ends.answer_back(1, 2, 3, 1))
    ends.edge_tells(ends.reply(1, 4, 1, 3))
    ends.cloud_tells(ends.end_back(1, 2, 1, opening=False, hidden=False))
    ends.cloud_tells(ends.end(1, 4, 2))
    ends.edge_tells(DropStep(1, 4))
    ends.edge_tells(ends.train(1, 5, (PROMPT_ROWS, 1)))
    ends.cloud_tells(ends.end(1, 5, 1))
    ends.edge_tells(ends.go_back(1, 5, 1))
    ends.cloud_tells(ends.end_back(1, 5, PROMPT_ROWS, hidden=False))
    ends.edge_tells(CloseSession(1))
    ends.cloud_tells(SessionClosed(1))
    ends.edge_tells(OpenSession(2, MAX_POSITIONS, "fp16", "fp16", training=True))
    ends.edge_tells(OpenSession(3, MAX_POSITIONS, "fp16", "fp16", training=True))
    ends.cloud_tells(ErrorReply(ErrorCode.CAPACITY, "all are at work", 2, {"limit": "2"}))
    ends.cloud_tells(SessionOpened(3, MAX_POSITIONS))


def training_crossings(ends: Conversation) -> None:
    """Last words that cross what the other end still says in a session for training."""
    ends.greet()
    ends.edge_tells(OpenSession(1, MAX_POSITIONS, "fp16", "fp16", training=True))
    ends.cloud_says(SessionOpened(1, MAX_POSITIONS))
    ends.edge_says(CloseSession(1))
    ends.edge_hears()
    ends.cloud_hears()
    ends.cloud_tells(SessionClosed(1))

    ends.open_training(2)
    ends.edge_tells(ends.train(2, 0, (2, 1)))
    ends.cloud_tells(ends.end(2, 0, 1))
    ends.edge_tells(ends.go_back(2, 0, 1))
    ends.edge_tells(ends.train(2, 1, (1, 1)))
    ends.cloud_says(ends.ask_back(2, 0, 1, 2))
    ends.cloud_says(ends.end(2, 1, 1))
    ends.edge_says(CloseSession(2))
    ends.edge_hears()
    ends.edge_hears()
    ends.cloud_hears()
    ends.cloud_tells(SessionClosed(2))

    ends.open_training(3)
    ends.edge_tells(ends.train(3, 0, (1, 1)))
    ends.cloud_tells(ends.end(3, 0, 1))
    ends.edge_tells(ends.go_back(3, 0, 1))
    ends.cloud_says(ends.end_back(3, 0, 1))
    ends.edge_says(ErrorReply(ErrorCode.INTERNAL, "cannot go on", 3))
    ends.edge_hears()
    ends.cloud_hears()
    ends.cloud_tells(SessionClosed(3))

    ends.open_training(4)
    ends.edge_tells(ends.train(4, 0, (1, 1)))
    ends.cloud_tells(ends.end(4, 0, 1))
    ends.edge_says(ends.go_back(4, 0, 1))
    ends.edge_says(ends.train(4, 1, (2, 1)))
    ends.edge_says(CloseSession(4))
    ends.cloud_says(ErrorReply(ErrorCode.EVICTED, "another needs its place", 4))
    for _ in range(3):
        ends.cloud_hears()
    ends.edge_hears()

    ends.open_training(5)
    ends.edge_tells(ends.train(5, 0, (1, 1)))
    ends.cloud_tells(ends.end(5, 0, 1))
    ends.edge_tells(ends.go_back(5, 0, 1))
    ends.cloud_tells(ends.ask_back(5, 0, 2, 1))
    ends.edge_tells(ends.train(5, 1, (1, 1)))
    ends.cloud_tells(ends.end(5, 1, 1))
    ends.edge_says(ends.answer_back(5, 0, 2, 1))
    ends.edge_says(DropStep(5, 1))
    ends.cloud_says(ErrorReply(ErrorCode.REQUEST, "cannot be done", 5))
    ends.edge_hears()
    ends.cloud_hears()
    ends.cloud_hears()
