"""Two ends that are recorded while they talk."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice

import torch

from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.tensors import pack
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    BatchSequence,
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
    TensorPayload,
    TrainBegin,
)
from tests.fuzz.end import HIDDEN, LIMITS, MAX_POSITIONS, OPENING, Y, Z
from tests.wire.ends import Ends
from tests.wire.samples import CLOUD_HELLO, EDGE_HELLO

PROMPT_ROWS = 40
"""Frames of so many rows are larger than those the stream's reader keeps in its buffer."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something said or heard; ``message`` is None for what was heard late."""

    heard: bool
    message: Message | None
    frame: bytes


@dataclass(frozen=True, slots=True)
class Recording:
    """A conversation as one end had it."""

    name: str
    role: Role
    events: tuple[Event, ...]

    @property
    def heard(self) -> tuple[Event, ...]:
        """What the peer said."""
        return tuple(event for event in self.events if event.heard)


class Conversation(Ends):
    """Two ends that are recorded, and the tensors they send: each in the next codec."""

    def __init__(self, first_codec: int) -> None:
        super().__init__(LIMITS)
        self.events: dict[Role, list[Event]] = {Role.EDGE: [], Role.CLOUD: []}
        self._codecs = islice(cycle(CODEC_NAMES), first_codec, None)
        self._generator = torch.Generator().manual_seed(first_codec)
        self._alike = cycle((False, True, True))

    def edge_says(self, message: Message) -> None:
        super().edge_says(message)
        self._record(Role.EDGE, False, message, self.to_cloud[-1])

    def cloud_says(self, message: Message) -> None:
        super().cloud_says(message)
        self._record(Role.CLOUD, False, message, self.to_edge[-1])

    def cloud_hears(self) -> Message | None:
        frame = self.to_cloud[0]
        message = super().cloud_hears()
        self._record(Role.CLOUD, True, message, frame)
        return message

    def edge_hears(self) -> Message | None:
        frame = self.to_edge[0]
        message = super().edge_hears()
        self._record(Role.EDGE, True, message, frame)
        return message

    def _record(self, role: Role, heard: bool, message: Message | None, frame: memoryview) -> None:
        self.events[role].append(Event(heard, message, bytes(frame)))

    def tensor(self, rows: int, features: int) -> TensorPayload:
        """Noise, or every other time or so numbers that can be compressed."""
        tensor = torch.randn(rows, features, generator=self._generator)
        if next(self._alike):
            tensor = tensor[:, :1].repeat(1, features)
        return pack(tensor, next(self._codecs))

    def greet(self) -> None:
        self.edge_tells(EDGE_HELLO)
        self.cloud_tells(CLOUD_HELLO)

    def open(self, session_id: int) -> None:
        self.edge_tells(OpenSession(session_id, MAX_POSITIONS, "fp16", "int8+lz4"))
        self.cloud_tells(SessionOpened(session_id, MAX_POSITIONS))

    def open_training(self, session_id: int) -> None:
        self.edge_tells(OpenSession(session_id, MAX_POSITIONS, "fp16", "int8+lz4", training=True))
        self.cloud_tells(SessionOpened(session_id, MAX_POSITIONS))

    def begin(
        self, session_id: int, step_id: int, rows: int, wanted: OutputRows, *, opening: bool = True
    ) -> StepBegin:
        hidden_states = self.tensor(rows, HIDDEN)
        y = self.tensor(rows, OPENING) if opening else None
        return StepBegin(session_id, step_id, step_id, wanted, hidden_states, y)

    def request(self, session_id: int, step_id: int, point: int, rows: int) -> ExchangeRequest:
        return ExchangeRequest(session_id, step_id, point, self.tensor(rows, Z))

    def reply(self, session_id: int, step_id: int, point: int, rows: int) -> ExchangeReply:
        return ExchangeReply(session_id, step_id, point, self.tensor(rows, Y))

    def end(self, session_id: int, step_id: int, rows: int) -> StepEnd:
        return StepEnd(session_id, step_id, self.tensor(rows, HIDDEN))

    def train(
        self,
        session_id: int,
        step_id: int,
        *sequences: tuple[int, int],
        backward: bool = True,
        opening: bool = True,
    ) -> TrainBegin:
        batch = tuple(BatchSequence(*sequence) for sequence in sequences)
        rows = sum(sequence.num_rows for sequence in batch)
        hidden_states = self.tensor(rows, HIDDEN)
        y = self.tensor(rows, OPENING) if opening else None
        return TrainBegin(session_id, step_id, batch, backward, hidden_states, y)

    def go_back(self, session_id: int, step_id: int, rows: int) -> BackwardBegin:
        return BackwardBegin(session_id, step_id, self.tensor(rows, HIDDEN))

    def ask_back(self, session_id: int, step_id: int, point: int, rows: int) -> GradientRequest:
        return GradientRequest(session_id, step_id, point, self.tensor(rows, Y))

    def answer_back(self, session_id: int, step_id: int, point: int, rows: int) -> GradientReply:
        return GradientReply(session_id, step_id, point, self.tensor(rows, Z))

    def end_back(
        self, session_id: int, step_id: int, rows: int, *, opening: bool = True, hidden: bool = True
    ) -> BackwardEnd:
        y = self.tensor(rows, OPENING) if opening else None
        hidden_states = self.tensor(rows, HIDDEN) if hidden else None
        return BackwardEnd(session_id, step_id, y, hidden_states)
