"""Recorded conversations: what each end said and heard, in its own order.

Their beginnings lead an end into every state, and their frames are what the fuzzer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.wire.messages import (
    CloseSession,
    ErrorCode,
    ErrorReply,
    OpenSession,
    OutputRows,
    Ping,
    Pong,
    SessionClosed,
    SessionOpened,
)
from privatelora.transports.framing import HEADER, MAGIC
from tests.fuzz.conversations import PROMPT_ROWS, Conversation, Recording
from tests.fuzz.end import MAX_POSITIONS, End, Tally
from tests.fuzz.training_scripts import training, training_crossings
from tests.wire.samples import EDGE_HELLO

GOODBYE = ErrorReply(ErrorCode.INTERNAL, "no more")


def streamed(frame: bytes) -> bytes:
    """A frame as a stream carries it."""
    return HEADER.pack(MAGIC, len(frame)) + frame


class Follower(End):
    """Says what was said in a recording, as long as it hears what was heard there."""

    def __init__(self, recording: Recording, tally: Tally) -> None:
        super().__init__(recording.role, tally)
        self._events = iter(recording.events)
        self._next = next(self._events, None)
        self._speak()

    def _hear(self, frame: memoryview) -> None:
        super()._hear(frame)
        if self._next is not None and frame == self._next.frame:
            self._next = next(self._events, None)
            self._speak()
        else:
            self._next = None

    def _speak(self) -> None:
        while self._next is not None and not self._next.heard:
            assert self._next.message is not None
            self.say(self._next.message)
            self._next = next(self._events, None)


def _steps(ends: Conversation) -> None:
    """One step alone, three at a time, three sessions at a time."""
    ends.greet()
    ends.open(1)
    ends.edge_tells(ends.begin(1, 0, 3, OutputRows.ALL))
    for point in (0, 2):
        ends.cloud_tells(ends.request(1, 0, point, 3))
        ends.edge_tells(ends.reply(1, 0, point, 3))
    ends.cloud_tells(ends.end(1, 0, 3))
    ends.edge_tells(Ping(0))
    ends.edge_tells(Ping(2**53 - 1))
    ends.cloud_tells(Pong(0))
    ends.edge_tells(ends.begin(1, 3, 1, OutputRows.LAST, opening=False))
    ends.edge_tells(ends.begin(1, 4, 2, OutputRows.NONE))
    ends.cloud_tells(Pong(2**53 - 1))
    ends.edge_tells(ends.begin(1, 6, 1, OutputRows.ALL))
    ends.cloud_tells(ends.request(1, 3, 1, 1))
    ends.cloud_tells(ends.request(1, 4, 1, 2))
    ends.edge_tells(ends.reply(1, 4, 1, 2))
    ends.edge_tells(ends.reply(1, 3, 1, 1))
    ends.cloud_tells(ends.end(1, 3, 1))
    ends.cloud_tells(ends.end(1, 4, 0))
    ends.edge_tells(OpenSession(2, MAX_POSITIONS, "fp16", "fp16"))
    ends.edge_tells(OpenSession(7, MAX_POSITIONS, "fp16", "fp16"))
    ends.cloud_tells(ErrorReply(ErrorCode.CAPACITY, "no room", 2, {"limit": "2"}))
    ends.cloud_tells(SessionOpened(7, MAX_POSITIONS))
    ends.edge_tells(CloseSession(1))
    ends.cloud_tells(SessionClosed(1))
    ends.edge_tells(GOODBYE)


def _crossings(ends: Conversation) -> None:
    """Last words that cross what the other end still says."""
    ends.greet()
    ends.edge_tells(OpenSession(1, MAX_POSITIONS, "fp16", "fp16"))
    ends.cloud_says(SessionOpened(1, MAX_POSITIONS))
    ends.edge_says(CloseSession(1))
    ends.edge_hears()
    ends.cloud_hears()
    ends.cloud_tells(SessionClosed(1))

    ends.open(2)
    ends.edge_tells(ends.begin(2, 0, 2, OutputRows.LAST))
    ends.edge_tells(ends.begin(2, 2, 1, OutputRows.LAST))
    ends.cloud_says(ends.request(2, 0, 0, 2))
    ends.cloud_says(ends.end(2, 2, 1))
    ends.edge_says(ErrorReply(ErrorCode.INTERNAL, "cannot go on", 2))
    ends.edge_hears()
    ends.edge_hears()
    ends.cloud_hears()
    ends.cloud_tells(ErrorReply(ErrorCode.INTERNAL, "could not tidy up", 2))

    ends.open(3)
    ends.edge_tells(ends.begin(3, 0, 1, OutputRows.ALL))
    ends.cloud_tells(ends.request(3, 0, 1, 1))
    ends.edge_says(ends.begin(3, 1, 1, OutputRows.ALL))
    ends.edge_says(ends.reply(3, 0, 1, 1))
    ends.edge_says(CloseSession(3))
    ends.cloud_says(ErrorReply(ErrorCode.REQUEST, "cannot be done", 3))
    for _ in range(3):
        ends.cloud_hears()
    ends.edge_hears()

    ends.open(4)
    ends.edge_tells(CloseSession(4))
    ends.edge_tells(OpenSession(5, MAX_POSITIONS, "fp16", "fp16"))
    ends.cloud_tells(SessionClosed(4))
    ends.cloud_says(GOODBYE)
    ends.edge_says(CloseSession(5))
    ends.edge_says(Ping(1))
    ends.edge_hears()
    ends.cloud_hears()
    ends.cloud_hears()


def _pinged(ends: Conversation) -> None:
    """Goodbyes that cross a question and its answer."""
    ends.greet()
    ends.edge_tells(Ping(7))
    ends.cloud_says(Pong(7))
    ends.edge_says(Ping(8))
    ends.edge_says(GOODBYE)
    ends.edge_hears()
    ends.cloud_hears()
    ends.cloud_hears()


def _prompt(ends: Conversation) -> None:
    """Many rows, and goodbyes that cross."""
    ends.greet()
    ends.open(0)
    ends.edge_tells(ends.begin(0, 0, PROMPT_ROWS, OutputRows.ALL))
    ends.cloud_tells(ends.request(0, 0, 3, PROMPT_ROWS))
    ends.edge_tells(ends.reply(0, 0, 3, PROMPT_ROWS))
    ends.cloud_tells(ends.end(0, 0, PROMPT_ROWS))
    ends.edge_says(GOODBYE)
    ends.cloud_says(GOODBYE)
    ends.edge_hears()
    ends.cloud_hears()


def _gone(ends: Conversation) -> None:
    """An edge that thinks better of it."""
    ends.edge_tells(EDGE_HELLO)
    ends.edge_tells(GOODBYE)


def _refused(ends: Conversation) -> None:
    """An edge that is not let in."""
    ends.edge_tells(EDGE_HELLO)
    ends.cloud_tells(ErrorReply(ErrorCode.MISMATCH, "another model"))


def _unwelcome(ends: Conversation) -> None:
    """A cloud that wants to hear nothing."""
    ends.cloud_says(ErrorReply(ErrorCode.VERSION, "versions differ"))
    ends.edge_says(EDGE_HELLO)
    ends.cloud_hears()
    ends.edge_hears()


def _rebuffed(ends: Conversation) -> None:
    """An edge that hears something before it says anything."""
    ends.cloud_tells(ErrorReply(ErrorCode.INTERNAL, "not now"))


def _record(script: Callable[[Conversation], None], first_codec: int) -> Iterator[Recording]:
    ends = Conversation(first_codec)
    script(ends)
    for role, events in ends.events.items():
        yield Recording(f"{script.__name__.lstrip('_')}-{first_codec}-{role}", role, tuple(events))


@cache
def recordings() -> tuple[Recording, ...]:
    """Every conversation from both ends, in every codec where tensors are sent."""
    return (
        *_record(_gone, 0),
        *_record(_refused, 0),
        *_record(_unwelcome, 0),
        *_record(_rebuffed, 0),
        *_record(_pinged, 0),
        *(
            recording
            for script in (_steps, _crossings, _prompt, training, training_crossings)
            for first_codec in range(len(CODEC_NAMES))
            for recording in _record(script, first_codec)
        ),
    )
