"""Frames over a real connection: a conversation up to some turn, then something wrong."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from privatelora.errors import (
    ConnectionClosed,
    LocalProtocolError,
    PrivateLoRAError,
    ProtocolError,
)
from privatelora.runtime.wire.codec import decode
from privatelora.runtime.wire.messages import (
    BatchSequence,
    CloseSession,
    ErrorReply,
    Message,
    OpenSession,
    Ping,
    StepBegin,
    TensorPayload,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.transports.base import Connection
from tests.fuzz.daemons.conversation import GOODBYE, MAX_POSITIONS, Conversation, to_frame
from tests.fuzz.daemons.inputs import Input, Outcome, Violation
from tests.fuzz.daemons.pipes import END_DEADLINE_S, WAIT_S
from tests.fuzz.mutations import below, mutate, pick

Connect = Callable[[], Awaitable[Connection]]

_ODD_VALUES: tuple[object, ...] = (
    *(0, 1, 2, 3, 7, 63, 64, 65, 255, 2**16, 2**31, 2**32 - 1, 2**53 - 1, 2**53, -1),
    *("fp32", "fp16", "int4", "int4+lz4", "fp8", "int3", "", "x" * 200, None, True),
)
_NUM_FLOOD = (9, 9, 70, 150)
"""A cloud reads a hundred in a second."""
_NUM_LARGE_ROWS = (60, 65, 1500)


class FrameInputs:
    """Makes inputs of frames, spoilt or out of their order."""

    def __init__(self, connect: Connect, conversations: Sequence[Conversation]) -> None:
        self._connect = connect
        self._conversations = conversations
        self._frames = tuple(
            frame
            for conversation in conversations
            for turn in conversation
            for frame in turn.frames
        )

    def make(self, rng: Random) -> Input:
        conversation = pick(rng, self._conversations)
        position = below(rng, len(conversation))
        before, due = conversation[:position], conversation[position]
        after = [frame for turn in conversation[position + 1 :] for frame in turn.frames]
        frames = list(due.frames)
        kind = pick(rng, _KINDS)
        if kind == "frame spoilt":
            index = below(rng, len(frames))
            frames[index] = mutate(rng, frames[index], pick(rng, self._frames))
        elif kind == "message spoilt":
            index = below(rng, len(frames))
            frames[index] = spoilt_message(rng, due.messages[index])
        elif kind == "frame out of order":
            frames.insert(below(rng, len(frames) + 1), pick(rng, self._frames))
        elif kind == "frame repeated":
            frames.insert(below(rng, len(frames)), pick(rng, frames))
        elif kind == "frame left out":
            del frames[below(rng, len(frames))]
        elif kind == "frame large":
            frames = [_large(rng, conversation)]
        elif kind == "flood":
            frames = _flood(rng, conversation)
        num_more = below(rng, len(after) + 1) if rng.random() < 0.3 else 0
        talk = _Talk(
            before,
            tuple(frames + after[:num_more]),
            due.num_answers if rng.random() < 0.5 else 0,
            leaves=kind == "left",
        )
        return Input(f"connection: {kind}", lambda: talk.run(self._connect))


_KINDS = (
    *("frame spoilt", "message spoilt", "frame spoilt", "message spoilt", "frame out of order"),
    *("frame repeated", "frame left out", "left"),
    *("frame spoilt", "message spoilt", "frame out of order", "frame large", "flood"),
)


@dataclasses.dataclass(frozen=True)
class _Talk:
    """``num_awaited``: answers that are waited for, in vain perhaps, before this end leaves."""

    before: Conversation
    frames: tuple[bytes, ...]
    num_awaited: int
    leaves: bool

    async def run(self, connect: Connect) -> Outcome:
        try:
            connection = await connect()
        except PrivateLoRAError:  # too many are there, perhaps: whether anybody gets in is looked
            return Outcome.REFUSED  # at after the batch
        listener = Listener(connection)
        try:
            async with asyncio.timeout(END_DEADLINE_S):
                with suppress(ConnectionClosed):
                    await self._talk(connection, listener)
                if not self.leaves:
                    await listener.to_the_end()
        except TimeoutError as error:
            raise Violation(
                f"a connection did not come to its end in {END_DEADLINE_S:g} s: {listener.progress}"
            ) from error
        except (LocalProtocolError, TurnedAwayError):
            return Outcome.REFUSED
        finally:
            connection.abort()
        return listener.outcome

    async def _talk(self, connection: Connection, listener: Listener) -> None:
        for turn in self.before:
            for frame in turn.frames:
                await connection.send(frame)
            for _ in range(turn.num_answers):
                await listener.hear_answer()
        listener.begin()
        for frame in self.frames:
            await connection.send(frame)
        for _ in range(self.num_awaited):
            try:
                async with asyncio.timeout(WAIT_S):
                    await listener.hear()
            except TimeoutError:
                break
        if not self.leaves:
            await connection.send(to_frame(GOODBYE))


class TurnedAwayError(Exception):
    """The cloud has no room: there are too many, or a session was idle and had to go."""


class Listener:
    """Hears what a cloud says, all of which has to be messages."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._num_heard = 0
        self._was_refused = False
        self._has_begun = False

    @property
    def outcome(self) -> Outcome:
        if self._was_refused:
            return Outcome.REFUSED
        return Outcome.ANSWERED if self._num_heard else Outcome.CLOSED

    @property
    def progress(self) -> str:
        """How far it got."""
        when = "since what was wrong" if self._has_begun else "of a conversation so far good"
        return f"{self._num_heard} answers {when}"

    def begin(self) -> None:
        """From now on it counts."""
        self._num_heard = 0
        self._has_begun = True

    async def hear(self) -> Message:
        """The next message. Raises ConnectionClosed, or Violation."""
        try:
            frame = await self._connection.recv()
            message = decode(frame, WireLimits())
        except ConnectionClosed:
            raise
        except ProtocolError as error:
            raise Violation(f"the cloud said what is no message: {error}") from error
        self._num_heard += 1
        self._was_refused |= isinstance(message, ErrorReply)
        return message

    async def hear_answer(self) -> Message:
        """What a good edge is told. Raises TurnedAwayError as well."""
        message = await self.hear()
        if isinstance(message, ErrorReply):
            raise TurnedAwayError
        return message

    async def to_the_end(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                await self.hear()


def spoilt_message(rng: Random, message: Message) -> bytes:
    """With another value in one field, as far as that can be written."""
    name = pick(rng, dataclasses.fields(message)).name
    value = getattr(message, name)
    odd: object = pick(rng, _ODD_VALUES)
    if isinstance(value, TensorPayload):
        odd = with_fields(value, _spoilt_tensor(rng, value))
    elif isinstance(value, int) and rng.random() < 0.5:
        odd = value + pick(rng, (-1, 1, 1000))
    try:
        return to_frame(with_fields(message, {name: odd}))
    except Exception:  # there is no way to write it down
        return mutate(rng, to_frame(message), to_frame(message))


def with_fields(value: Any, fields: Mapping[str, object]) -> Any:
    """A message or tensor with other values, of whatever type, in some fields."""
    return dataclasses.replace(value, **fields)


def _spoilt_tensor(rng: Random, tensor: TensorPayload) -> dict[str, object]:
    rows, features = tensor.shape
    data = bytes(tensor.data)
    return pick(
        rng,
        (
            {"shape": (rows + pick(rng, (-1, 1, 100)), features)},
            {"shape": (rows, features + pick(rng, (-1, 1, 100)))},
            {"codec": str(pick(rng, ("fp32", "fp16", "bf16", "int8", "int4+lz4", "none")))},
            {"data": rng.randbytes(len(data))},
            {"data": b"\xff" * len(data)},
            {"data": data[: below(rng, len(data) + 1)]},
        ),
    )


def _first_step(conversation: Conversation) -> StepBegin | TrainBegin:
    messages = (message for turn in conversation for message in turn.messages)
    return next(message for message in messages if isinstance(message, StepBegin | TrainBegin))


def _large(rng: Random, conversation: Conversation) -> bytes:
    """A step of more rows than there is room for, or just as many."""
    step = _first_step(conversation)
    rows = pick(rng, _NUM_LARGE_ROWS)

    def grown(tensor: TensorPayload | None) -> TensorPayload | None:
        if tensor is None:
            return None
        features = tensor.shape[1]
        return TensorPayload("fp32", (rows, features), bytes(4 * rows * features))

    hidden_states = grown(step.hidden_states)
    assert hidden_states is not None
    large = dataclasses.replace(
        step, step_id=9, hidden_states=hidden_states, opening=grown(step.opening)
    )
    if isinstance(large, TrainBegin):
        large = dataclasses.replace(large, sequences=_batch(rng, rows))
    return to_frame(large)


def _batch(rng: Random, rows: int) -> tuple[BatchSequence, ...]:
    """All rows in one sequence, or each in its own."""
    num_rows = pick(rng, (1, rows))
    return (BatchSequence(num_rows, below(rng, num_rows + 1)),) * (rows // num_rows)


def _flood(rng: Random, conversation: Conversation) -> list[bytes]:
    """More of something than may wait for an answer."""
    number = pick(rng, _NUM_FLOOD)
    way = below(rng, 5)
    if way == 0:
        return [to_frame(Ping(100 + i)) for i in range(number)]
    if way == 1:
        return [
            to_frame(OpenSession(100 + i, MAX_POSITIONS, "fp16", "fp16")) for i in range(number)
        ]
    if way == 2:
        step = _first_step(conversation)
        return [to_frame(dataclasses.replace(step, step_id=50 + i)) for i in range(min(number, 70))]
    trains = way == 3
    frames = []
    for i in range(number):
        opening = OpenSession(100 + i, MAX_POSITIONS, "fp16", "fp16", training=trains)
        frames.append(to_frame(opening))
        frames.append(to_frame(CloseSession(100 + i)))
    return frames
