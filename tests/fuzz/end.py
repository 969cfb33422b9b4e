"""What a real end does with the bytes it gets: a stream to frames, to messages, to tensors.

``FrameReader`` and ``WireConnection`` are used as ``transports/stream.py`` uses them, the payload
codecs as ``runtime/cloud_peer.py``, ``runtime/training_session.py`` and
``runtime/split_model.py`` do: a tensor is read only if
it has the shape that is due. What an end would compute with it is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from privatelora.errors import ProtocolError, RemoteProtocolError, VersionMismatch
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.tensors import unpack
from privatelora.runtime.wire.codec import decode
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    ErrorCode,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    Message,
    OutputRows,
    Role,
    StepBegin,
    StepEnd,
    TensorPayload,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import TYPES, WireLimits
from privatelora.runtime.wire.state import WireConnection
from privatelora.transports.flow import FrameQueue, again
from privatelora.transports.framing import FrameReader

HIDDEN, Z, Y, OPENING = 136, 40, 72, 72
"""Features of each kind of tensor: several groups of every codec that has them, the last short."""
POINTS = range(4)
"""Exchange points that a cloud may ask for."""
MAX_POSITIONS = 64
"""Positions of every session, and rows of a batch."""
LIMITS = WireLimits(max_sessions=3, max_steps=3)
"""Small enough to be reached."""
MAX_FRAME_NBYTES = 2**17
MAX_QUEUED_NBYTES = 4096

_OfStep = ExchangeRequest | ExchangeReply | GradientRequest | GradientReply | BackwardEnd
_CPU = torch.device("cpu")
_DTYPES = {Role.CLOUD: torch.bfloat16, Role.EDGE: torch.float32}
_TYPE_NAMES = {number: kind.__name__ for kind, number in TYPES.items()}

VERDICTS = ("message", "late", "too long", "version", "format", "order", "tensor")
"""What a frame can turn out to be: a message; one that came too late to matter; a step too long for
its session, which ends the session; VersionMismatch; RemoteProtocolError because it is no message,
because it may not be said now, because a tensor is not the one that is due or cannot be read."""


@dataclass
class Tally:
    """How many of what became what.

    ``frames``: by type of message and verdict. ``tensors``: of the shape that was due, by codec
    and whether they could be read.
    """

    frames: Counter[tuple[str, str]] = field(default_factory=Counter)
    tensors: Counter[tuple[str, bool]] = field(default_factory=Counter)


class End:
    """The listening side of one end of one connection.

    ``heard``: all frames that were legal, and their messages; None for one that came late.
    ``last_frame``: the last one that was whole.
    """

    def __init__(self, role: Role, tally: Tally) -> None:
        self.wire = WireConnection(role, LIMITS)
        self.heard: list[tuple[memoryview, Message | None]] = []
        self.last_frame = memoryview(b"")
        self._tally = tally
        self._dtype = _DTYPES[role]
        self._queue = FrameQueue(MAX_QUEUED_NBYTES, self._room_made)
        self._reader = FrameReader(self._queue, MAX_FRAME_NBYTES, "the peer")
        # Rows of each step and of what it returns, and whether it has an opening. Ids are never
        # used again.
        self._rows: dict[tuple[int, int], tuple[int, int]] = {}
        self._has_opening: dict[tuple[int, int], bool] = {}

    @property
    def in_frame(self) -> bool:
        """Whether the stream so far ends inside a frame."""
        return self._reader.in_frame

    @property
    def stream_is_broken(self) -> bool:
        """Whether the reader refused the stream; nobody reads on then."""
        return self._queue.error is not None

    def say(self, message: Message) -> None:
        """Do what saying this does to the connection."""
        self.wire.send(message)
        if isinstance(message, StepBegin | TrainBegin):
            self._note(message)

    def recall(self, frame: bytes) -> None:
        """Do what hearing this did to the connection, but leave its tensors alone."""
        message = self.wire.receive(memoryview(frame))
        if isinstance(message, StepBegin | TrainBegin):
            self._note(message)

    def feed(self, data: bytes) -> None:
        """Take in the next bytes of the stream, and all frames that are whole then.

        Raises RemoteProtocolError or VersionMismatch for the first breach.
        """
        rest = memoryview(data)
        while rest:
            num_taken = min(len(self._reader.free), len(rest))
            assert num_taken, "no room in the reader, nothing in the queue"
            self._reader.free[:num_taken] = rest[:num_taken]
            rest = rest[num_taken:]
            self._cut(self._reader.advance, num_taken)
            while self._queue.frames:
                self._hear(self._queue.pop())
            if self._queue.error is not None:
                raise again(self._queue.error)

    def _room_made(self) -> None:
        if self._queue.error is None:
            self._cut(self._reader.cut)

    def _cut(self, cut: Callable[..., int], *nbytes: int) -> None:
        try:
            cut(*nbytes)
        except RemoteProtocolError as error:
            self._queue.end(error)  # the frames before it are still to be heard

    def _hear(self, frame: memoryview) -> None:
        name = _TYPE_NAMES.get(frame[0], "unknown") if frame else "unknown"
        counts = self._tally.frames
        self.last_frame = frame
        try:
            message = self.wire.receive(frame)
        except VersionMismatch:
            counts[name, "version"] += 1
            raise
        except RemoteProtocolError:
            counts[name, "order" if _is_message(frame) else "format"] += 1
            raise
        self.heard.append((frame, message))
        if message is None:
            counts[name, "late"] += 1
            return
        try:
            in_bounds = self._take(message)
        except RemoteProtocolError:
            counts[name, "tensor"] += 1
            raise
        counts[name, "message" if in_bounds else "too long"] += 1

    def _take(self, message: Message) -> bool:
        """Read the tensors; whether there is room for them."""
        match message:
            case StepBegin() | TrainBegin():
                return self._begin(message)
            case ExchangeRequest(_, _, point) | GradientRequest(_, _, point):
                if point not in POINTS:
                    raise RemoteProtocolError(f"point {point} does not exist")
        match message:
            case ExchangeRequest(z=tensor) | GradientReply(z=tensor):
                self._read_due(tensor, self._num_rows(message), Z)
            case ExchangeReply(y=tensor) | GradientRequest(y=tensor):
                self._read_due(tensor, self._num_rows(message), Y)
            case StepEnd(hidden_states=tensor) | BackwardBegin(hidden_states=tensor):
                num_returned = self._rows[message.session_id, message.step_id][1]
                self._read_due(tensor, num_returned, HIDDEN)
            case BackwardEnd(session_id, step_id, opening, hidden_states):
                if (opening is not None) != self._has_opening[session_id, step_id]:
                    raise RemoteProtocolError("the gradient of an opening that was not, or not")
                if opening is not None:
                    self._read_due(opening, self._num_rows(message), OPENING)
                if hidden_states is not None:
                    self._read_due(hidden_states, self._num_rows(message), HIDDEN)
        return True

    def _begin(self, message: StepBegin | TrainBegin) -> bool:
        hidden_states, opening = message.hidden_states, message.opening
        rows = hidden_states.shape[0]
        _require_shape(hidden_states, rows, HIDDEN)
        end = message.position + rows if isinstance(message, StepBegin) else rows
        if end > MAX_POSITIONS:
            self.say(ErrorReply(ErrorCode.REQUEST, "too long", message.session_id))
            return False
        self._read(hidden_states)
        if opening is not None:
            self._read_due(opening, rows, OPENING)
        self._note(message)
        return True

    def _num_rows(self, message: _OfStep) -> int:
        return self._rows[message.session_id, message.step_id][0]

    def _note(self, step: StepBegin | TrainBegin) -> None:
        rows = step.hidden_states.shape[0]
        if isinstance(step, TrainBegin):
            num_returned = sum(sequence.num_output_rows for sequence in step.sequences)
        else:
            returned = {OutputRows.NONE: 0, OutputRows.LAST: 1, OutputRows.ALL: rows}
            num_returned = returned[step.output_rows]
        self._rows[step.session_id, step.step_id] = rows, num_returned
        self._has_opening[step.session_id, step.step_id] = step.opening is not None

    def _read_due(self, payload: TensorPayload, rows: int, features: int) -> None:
        _require_shape(payload, rows, features)
        self._read(payload)

    def _read(self, payload: TensorPayload) -> None:
        codec = payload.codec if payload.codec in CODEC_NAMES else "unknown"
        try:
            tensor = unpack(payload, _CPU, self._dtype)
        except RemoteProtocolError:
            self._tally.tensors[codec, False] += 1
            raise
        self._tally.tensors[codec, True] += 1
        assert (tensor.shape, tensor.dtype) == (payload.shape, self._dtype)
        if self._dtype is torch.float32 and codec.startswith(("int", "fp8")):
            assert tensor.isfinite().all(), "a number that the codec does not have"


def _require_shape(payload: TensorPayload, rows: int, features: int) -> None:
    if payload.shape != (rows, features):
        raise RemoteProtocolError(f"{payload.shape} came where {(rows, features)} was due")


def _is_message(frame: memoryview) -> bool:
    try:
        decode(frame, LIMITS)
    except ProtocolError:
        return False
    return True
