"""What a good edge says to a cloud with the tiny model, cut where it waits for answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from privatelora.partition.shard import open_shard
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.tensors import pack
from privatelora.runtime.wire.codec import encode
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BatchSequence,
    CloseSession,
    DropStep,
    ErrorCode,
    ErrorReply,
    ExchangeReply,
    Fingerprints,
    GradientReply,
    Hello,
    Message,
    OpenSession,
    OutputRows,
    Ping,
    Role,
    StepBegin,
    TensorPayload,
    TrainBegin,
)

MAX_POSITIONS = 64
NUM_PROMPT_ROWS = 6
GOODBYE = ErrorReply(ErrorCode.INTERNAL, "no more")


@dataclass(frozen=True)
class Turn:
    """Messages that an edge says without waiting, and how many the cloud then says."""

    messages: tuple[Message, ...]
    num_answers: int

    @cached_property
    def frames(self) -> tuple[bytes, ...]:
        return tuple(map(to_frame, self.messages))


Conversation = tuple[Turn, ...]


def to_frame(message: Message) -> bytes:
    """All parts of its frame."""
    return b"".join(encode(message))


@dataclass
class Speaker:
    """Makes messages that fit the model of a shard."""

    shard: Path

    def __post_init__(self) -> None:
        manifest = open_shard(self.shard, "cloud").manifest
        plan = manifest.plan
        self._z_size = plan.z_size
        self._hidden_size = manifest.config.hidden_size
        self._opening_size = len(plan.opening_layers) * plan.y_size
        self._points = [
            (point.index, len(plan.span_in(point, plan.cloud_layers)) * plan.y_size)
            for point in plan.wire_points
        ]
        self._fingerprints = Fingerprints(*manifest.fingerprints)
        self._generator = torch.Generator().manual_seed(1)

    def hello(self) -> Hello:
        return Hello(Role.EDGE, "fuzzer", self._fingerprints, CODEC_NAMES, 2**26)

    def conversations(self) -> Iterator[Conversation]:
        """One in each codec: steps one by one and two at a time, two sessions, questions."""
        for codec in CODEC_NAMES:
            yield self._conversation(codec)

    def training_conversations(self) -> Iterator[Conversation]:
        """One in each codec: steps that go back, that do not, two at a time, and one dropped."""
        for codec in CODEC_NAMES:
            yield self._training_conversation(codec)

    def _conversation(self, codec: str) -> Conversation:
        def begin(session: int, step: int, position: int, rows: int, wanted: OutputRows) -> Message:
            return self._begin(session, step, position, rows, wanted, codec)

        return (
            Turn((self.hello(),), 1),
            Turn((OpenSession(1, MAX_POSITIONS, codec, codec),), 1),
            *self._steps(codec, begin(1, 0, 0, NUM_PROMPT_ROWS, OutputRows.ALL)),
            *self._steps(
                codec,
                begin(1, 1, NUM_PROMPT_ROWS, 1, OutputRows.LAST),
                begin(1, 2, NUM_PROMPT_ROWS + 1, 2, OutputRows.NONE),
            ),
            Turn((Ping(1), Ping(2)), 2),
            Turn((OpenSession(2, MAX_POSITIONS, "fp16", codec),), 1),
            *self._steps(
                codec,
                begin(1, 3, NUM_PROMPT_ROWS, 1, OutputRows.LAST),
                begin(2, 0, 0, 3, OutputRows.LAST),
            ),
            Turn((CloseSession(1),), 1),
            Turn((ErrorReply(ErrorCode.INTERNAL, "cannot go on", 2),), 1),
            Turn((GOODBYE,), 0),
        )

    def _training_conversation(self, codec: str) -> Conversation:
        def train(step: int, *sequences: tuple[int, int], backward: bool = True) -> Message:
            batch = tuple(BatchSequence(*sequence) for sequence in sequences)
            rows = sum(sequence.num_rows for sequence in batch)
            return TrainBegin(1, step, batch, backward, *self._inputs(rows, codec))

        return (
            Turn((self.hello(),), 1),
            Turn((OpenSession(1, MAX_POSITIONS, codec, codec, training=True),), 1),
            *self._steps(codec, train(0, (4, 2), (2, 0), (1, 1))),
            *self._backward(codec, 0, num_rows=7, num_output_rows=3),
            *self._steps(codec, train(1, (3, 1)), train(2, (2, 2), backward=False)),
            Turn((DropStep(1, 1), train(3, (1, 1))), 1),
            Turn((CloseSession(1),), 1),
            Turn((GOODBYE,), 0),
        )

    def _begin(
        self, session: int, step: int, position: int, rows: int, wanted: OutputRows, codec: str
    ) -> StepBegin:
        return StepBegin(session, step, position, wanted, *self._inputs(rows, codec))

    def _inputs(self, rows: int, codec: str) -> tuple[TensorPayload, TensorPayload | None]:
        """Hidden states and opening."""
        opening = self._tensor(rows, self._opening_size, codec) if self._opening_size else None
        return self._tensor(rows, self._hidden_size, codec), opening

    def _steps(self, codec: str, *begins: Message) -> Iterator[Turn]:
        """Steps that go on at the same time, point by point."""
        yield Turn(begins, len(begins))
        for index, size in self._points:
            replies: list[Message] = []
            for begin in begins:
                assert isinstance(begin, StepBegin | TrainBegin)
                y = self._tensor(begin.hidden_states.shape[0], size, codec)
                replies.append(ExchangeReply(begin.session_id, begin.step_id, index, y))
            yield Turn(tuple(replies), len(replies))

    def _backward(
        self, codec: str, step: int, *, num_rows: int, num_output_rows: int
    ) -> Iterator[Turn]:
        """The way back of a training step, point by point."""
        gradient = self._tensor(num_output_rows, self._hidden_size, codec)
        yield Turn((BackwardBegin(1, step, gradient),), 1)
        for index, _ in reversed(self._points):
            of_z = self._tensor(num_rows, self._z_size, codec)
            yield Turn((GradientReply(1, step, index, of_z),), 1)

    def _tensor(self, rows: int, features: int, codec: str) -> TensorPayload:
        return pack(0.3 * torch.randn(rows, features, generator=self._generator), codec)
