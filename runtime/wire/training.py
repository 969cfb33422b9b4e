"""The messages of a training step, which is a batch of whole sequences.

Their layout is in ``codec.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import gt
from typing import Any

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    BatchSequence,
    Buffer,
    GradientReply,
    GradientRequest,
    Message,
    TensorPayload,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import (
    ID_BITS,
    MAX_SEQUENCES,
    PRELUDE,
    WireLimits,
    check_prelude,
)
from privatelora.runtime.wire.tensor_frames import (
    ALIGNMENT,
    NO_TENSOR,
    ONE_TENSOR,
    TWO_TENSORS,
    TWO_TENSORS_HEADER_NBYTES,
    bad_id,
    bad_shape,
    bad_size,
    codec_field,
    codec_name,
    data_nbytes,
    decode_one,
    encode_one,
    out_of_range,
    prelude_of,
    truncated,
)

_TRAIN_BEGIN = prelude_of(TrainBegin, TWO_TENSORS)
_BACKWARD_BEGIN = prelude_of(BackwardBegin, ONE_TENSOR)
_GRADIENT_REQUEST = prelude_of(GradientRequest, ONE_TENSOR)
_GRADIENT_REPLY = prelude_of(GradientReply, ONE_TENSOR)
_BACKWARD_END = prelude_of(BackwardEnd, TWO_TENSORS)
_SEQUENCE = struct.Struct("<II")

_Description = tuple[int, int, int, bytes]
"""Of a tensor: rows, features, bytes, codec."""


def _encode_train_begin(message: TrainBegin) -> tuple[Buffer, ...]:
    sequences, hidden_states, opening = message.sequences, message.hidden_states, message.opening
    reason = _why_no_batch(
        [one.num_rows for one in sequences],
        [one.num_output_rows for one in sequences],
        hidden_states.shape[0],
    )
    if reason is None and opening is not None and opening.shape[0] != hidden_states.shape[0]:
        reason = f"opening has {opening.shape[0]} rows in a batch of {hidden_states.shape[0]}"
    if message.backward not in (False, True):
        reason = f"backward {message.backward} is neither 0 nor 1"
    if reason is not None:
        raise LocalProtocolError(f"TrainBegin cannot be sent: {reason}")
    header = _pack_header(_TRAIN_BEGIN, message, len(sequences), message.backward)
    table = b"".join([_SEQUENCE.pack(one.num_rows, one.num_output_rows) for one in sequences])
    return header, *_join(table, hidden_states, opening)


def _encode_backward_begin(message: BackwardBegin) -> tuple[Buffer, ...]:
    return encode_one(
        _BACKWARD_BEGIN, message.session_id, message.step_id, 0, message.hidden_states
    )


def _encode_gradient_request(message: GradientRequest) -> tuple[Buffer, ...]:
    return encode_one(
        _GRADIENT_REQUEST, message.session_id, message.step_id, message.point, message.y
    )


def _encode_gradient_reply(message: GradientReply) -> tuple[Buffer, ...]:
    return encode_one(
        _GRADIENT_REPLY, message.session_id, message.step_id, message.point, message.z
    )


def _encode_backward_end(message: BackwardEnd) -> tuple[Buffer, ...]:
    header = _pack_header(_BACKWARD_END, message, 0, 0)
    return header, *_join(b"", message.opening, message.hidden_states)


def _pack_header(prelude: int, message: TrainBegin | BackwardEnd, number: int, flag: int) -> bytes:
    tensors = (message.hidden_states, message.opening)
    if isinstance(message, BackwardEnd):
        tensors = (message.opening, message.hidden_states)
    descriptions: list[int | bytes] = []
    for tensor in tensors:
        descriptions += (
            NO_TENSOR
            if tensor is None
            else (*tensor.shape, data_nbytes(tensor.data), codec_field(tensor.codec))
        )
    try:
        if (message.session_id | message.step_id) >> ID_BITS:
            raise struct.error(f"session {message.session_id}, step {message.step_id}")
        return TWO_TENSORS.pack(
            prelude, message.session_id, message.step_id, number, flag, *descriptions
        )
    except struct.error as error:
        raise out_of_range(type(message).__name__, error) from error


def _join(first: bytes, *tensors: TensorPayload | None) -> tuple[Buffer, ...]:
    """``first`` and the tensors that are there, each at a multiple of ALIGNMENT."""
    parts: list[Buffer] = [first] if first else []
    nbytes = len(first)
    for tensor in tensors:
        if tensor is None:
            continue
        if padding := -nbytes % ALIGNMENT:
            parts.append(bytes(padding))
        parts.append(tensor.data)
        nbytes += padding + len(tensor.data)
    return tuple(parts)


def _why_no_batch(rows: Sequence[int], output_rows: Sequence[int], num_rows: int) -> str | None:
    """What is wrong with the sequences of a batch, if anything is."""
    if not 1 <= len(rows) <= MAX_SEQUENCES:
        return f"a batch of {len(rows)} sequences, not 1 to {MAX_SEQUENCES}"
    # Without a loop of Python's: a peer may send many of these.
    if min(rows) < 1 or min(output_rows) < 0 or any(map(gt, output_rows, rows)):
        pairs = zip(rows, output_rows, strict=True)
        of, wanted = next((of, wanted) for of, wanted in pairs if of < 1 or not 0 <= wanted <= of)
        return f"a sequence of {of} rows of which {wanted} are wanted"
    if sum(rows) != num_rows:
        return f"hidden states of {num_rows} rows are not those of the sequences"
    return None


def _decode_train_begin(frame: memoryview, limits: WireLimits) -> TrainBegin:
    session_id, step_id, num_sequences, backward, *tensors = _unpack_header(
        frame, TrainBegin, _TRAIN_BEGIN
    )
    if backward > 1:
        raise RemoteProtocolError(f"TrainBegin: backward {backward} is neither 0 nor 1")
    if num_sequences > MAX_SEQUENCES:
        raise RemoteProtocolError(
            f"TrainBegin: a batch of {num_sequences} sequences, not 1 to {MAX_SEQUENCES}"
        )
    start = TWO_TENSORS_HEADER_NBYTES
    table = frame[start : start + num_sequences * _SEQUENCE.size]
    if len(table) != num_sequences * _SEQUENCE.size:
        raise truncated(frame, TrainBegin, start + num_sequences * _SEQUENCE.size)
    numbers: tuple[int, ...] = struct.unpack(f"<{2 * num_sequences}I", table)
    rows, output_rows = numbers[::2], numbers[1::2]
    hidden_states, opening = _cut(frame, limits, TrainBegin, start + len(table), *tensors)
    if hidden_states is None:
        raise RemoteProtocolError("TrainBegin: no hidden states")
    num_rows = hidden_states.shape[0]
    reason = _why_no_batch(rows, output_rows, num_rows)
    if reason is None and opening is not None and opening.shape[0] != num_rows:
        reason = f"opening has {opening.shape[0]} rows in a batch of {num_rows}"
    if reason is not None:
        raise RemoteProtocolError(f"TrainBegin: {reason}")
    batch = tuple(map(BatchSequence, rows, output_rows))
    return TrainBegin(session_id, step_id, batch, bool(backward), hidden_states, opening)


def _decode_backward_begin(frame: memoryview, limits: WireLimits) -> BackwardBegin:
    session_id, step_id, point, gradient = decode_one(frame, limits, BackwardBegin, _BACKWARD_BEGIN)
    if point:
        raise RemoteProtocolError(f"BackwardBegin: the reserved field is {point} instead of 0")
    return BackwardBegin(session_id, step_id, gradient)


def _decode_gradient_request(frame: memoryview, limits: WireLimits) -> GradientRequest:
    return GradientRequest(*decode_one(frame, limits, GradientRequest, _GRADIENT_REQUEST))


def _decode_gradient_reply(frame: memoryview, limits: WireLimits) -> GradientReply:
    return GradientReply(*decode_one(frame, limits, GradientReply, _GRADIENT_REPLY))


def _decode_backward_end(frame: memoryview, limits: WireLimits) -> BackwardEnd:
    session_id, step_id, zero, also_zero, *tensors = _unpack_header(
        frame, BackwardEnd, _BACKWARD_END
    )
    if zero or also_zero:
        raise RemoteProtocolError("BackwardEnd: a reserved field is not 0")
    opening, hidden_states = _cut(frame, limits, BackwardEnd, TWO_TENSORS_HEADER_NBYTES, *tensors)
    return BackwardEnd(session_id, step_id, opening, hidden_states)


def _unpack_header(
    frame: memoryview, kind: type[Message], prelude: int
) -> tuple[int, int, int, int, _Description, _Description]:
    if len(frame) < TWO_TENSORS_HEADER_NBYTES:
        raise truncated(frame, kind, TWO_TENSORS_HEADER_NBYTES)
    found, session_id, step_id, number, flag, *fields = TWO_TENSORS.unpack_from(frame)
    if found != prelude:
        check_prelude(frame, kind, TWO_TENSORS_HEADER_NBYTES - PRELUDE.size)
    if (session_id | step_id) >> ID_BITS:
        raise bad_id(kind)
    first, second = fields[:4], fields[4:]
    return session_id, step_id, number, flag, (*first,), (*second,)


def _cut(
    frame: memoryview,
    limits: WireLimits,
    kind: type[Message],
    end: int,
    *descriptions: _Description,
) -> list[TensorPayload | None]:
    """The tensors that follow what ends at ``end``; the frame has to end with the last."""
    tensors: list[TensorPayload | None] = []
    for rows, features, nbytes, codec in descriptions:
        if (rows, features, nbytes, codec) == NO_TENSOR:
            tensors.append(None)
            continue
        if rows > limits.max_rows or features > limits.max_features:
            raise bad_shape(kind, rows, features, limits)
        start = end + -end % ALIGNMENT
        if start + nbytes > len(frame):
            raise bad_size(kind, nbytes, max(0, len(frame) - start))
        if any(frame[end:start]):
            raise RemoteProtocolError(f"{kind.__name__}: the padding before a tensor is not zero")
        end = start + nbytes
        tensors.append(TensorPayload(codec_name(codec), (rows, features), frame[start:end]))
    if end != len(frame):
        header_nbytes = TWO_TENSORS_HEADER_NBYTES
        raise bad_size(kind, end - header_nbytes, len(frame) - header_nbytes)
    return tensors


# Each encoder takes the type it is listed under, which a dict cannot say.
ENCODERS: dict[type[Message], Callable[[Any], tuple[Buffer, ...]]] = {
    TrainBegin: _encode_train_begin,
    BackwardBegin: _encode_backward_begin,
    GradientRequest: _encode_gradient_request,
    GradientReply: _encode_gradient_reply,
    BackwardEnd: _encode_backward_end,
}
"""Return the parts of one frame; raise LocalProtocolError."""

DECODERS: dict[type[Message], Callable[[memoryview, WireLimits], Message]] = {
    TrainBegin: _decode_train_begin,
    BackwardBegin: _decode_backward_begin,
    GradientRequest: _decode_gradient_request,
    GradientReply: _decode_gradient_reply,
    BackwardEnd: _decode_backward_end,
}
"""Return the message in a frame; raise RemoteProtocolError."""
