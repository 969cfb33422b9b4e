"""The four messages of a step, sent for every exchange of every token.

Their layout is in ``codec.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.runtime.wire.messages import (
    Buffer,
    ExchangeReply,
    ExchangeRequest,
    Message,
    OutputRows,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.runtime.wire.prelude import ID_BITS, PRELUDE, WireLimits, check_prelude
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

_STEP_BEGIN = prelude_of(StepBegin, TWO_TENSORS)
_EXCHANGE_REQUEST = prelude_of(ExchangeRequest, ONE_TENSOR)
_EXCHANGE_REPLY = prelude_of(ExchangeReply, ONE_TENSOR)
_STEP_END = prelude_of(StepEnd, ONE_TENSOR)
_OUTPUT_ROWS = tuple(OutputRows)


def _encode_exchange_request(message: ExchangeRequest) -> tuple[Buffer, ...]:
    return encode_one(
        _EXCHANGE_REQUEST, message.session_id, message.step_id, message.point, message.z
    )


def _encode_exchange_reply(message: ExchangeReply) -> tuple[Buffer, ...]:
    return encode_one(
        _EXCHANGE_REPLY, message.session_id, message.step_id, message.point, message.y
    )


def _encode_step_end(message: StepEnd) -> tuple[Buffer, ...]:
    return encode_one(_STEP_END, message.session_id, message.step_id, 0, message.hidden_states)


def _encode_step_begin(message: StepBegin) -> tuple[Buffer, ...]:
    hidden_states, opening = message.hidden_states, message.opening
    rows, features = hidden_states.shape
    hidden_nbytes = data_nbytes(hidden_states.data)
    if rows < 1:
        raise LocalProtocolError("StepBegin cannot be sent: a step of no rows")
    if opening is not None and opening.shape[0] != rows:
        raise LocalProtocolError(
            f"StepBegin cannot be sent: opening has {opening.shape[0]} rows in a step of {rows}"
        )
    try:
        if (message.session_id | message.step_id) >> ID_BITS:
            raise struct.error(f"session {message.session_id}, step {message.step_id}")
        header = TWO_TENSORS.pack(
            _STEP_BEGIN,
            message.session_id,
            message.step_id,
            message.position,
            message.output_rows,
            rows,
            features,
            hidden_nbytes,
            codec_field(hidden_states.codec),
            *(
                NO_TENSOR
                if opening is None
                else (*opening.shape, data_nbytes(opening.data), codec_field(opening.codec))
            ),
        )
    except struct.error as error:
        raise out_of_range("StepBegin", error) from error
    if opening is None:
        return header, hidden_states.data
    padding = bytes(-hidden_nbytes % ALIGNMENT)
    return header, hidden_states.data, padding, opening.data


def _decode_exchange_request(frame: memoryview, limits: WireLimits) -> ExchangeRequest:
    return ExchangeRequest(*decode_one(frame, limits, ExchangeRequest, _EXCHANGE_REQUEST))


def _decode_exchange_reply(frame: memoryview, limits: WireLimits) -> ExchangeReply:
    return ExchangeReply(*decode_one(frame, limits, ExchangeReply, _EXCHANGE_REPLY))


def _decode_step_end(frame: memoryview, limits: WireLimits) -> StepEnd:
    session_id, step_id, point, hidden_states = decode_one(frame, limits, StepEnd, _STEP_END)
    if point:
        raise RemoteProtocolError(f"StepEnd: the reserved field is {point} instead of 0")
    return StepEnd(session_id, step_id, hidden_states)


def _decode_step_begin(frame: memoryview, limits: WireLimits) -> StepBegin:
    if len(frame) < TWO_TENSORS_HEADER_NBYTES:
        raise truncated(frame, StepBegin, TWO_TENSORS_HEADER_NBYTES)
    prelude, session_id, step_id, position, output_rows, rows, features, nbytes, codec, *opening = (
        TWO_TENSORS.unpack_from(frame)
    )
    if prelude != _STEP_BEGIN:
        check_prelude(frame, StepBegin, TWO_TENSORS_HEADER_NBYTES - PRELUDE.size)
    if (session_id | step_id) >> ID_BITS:
        raise bad_id(StepBegin)
    if output_rows >= len(_OUTPUT_ROWS):
        raise RemoteProtocolError(f"StepBegin: output_rows {output_rows} does not exist")
    if rows > limits.max_rows or features > limits.max_features:
        raise bad_shape(StepBegin, rows, features, limits)
    if not rows:
        raise RemoteProtocolError("StepBegin: a step of no rows")
    end = TWO_TENSORS_HEADER_NBYTES + nbytes
    return StepBegin(
        session_id,
        step_id,
        position,
        _OUTPUT_ROWS[output_rows],
        TensorPayload(codec_name(codec), (rows, features), frame[TWO_TENSORS_HEADER_NBYTES:end]),
        _decode_opening(frame, limits, end, rows, *opening),
    )


def _decode_opening(
    frame: memoryview,
    limits: WireLimits,
    end: int,
    step_rows: int,
    rows: int,
    features: int,
    nbytes: int,
    codec: bytes,
) -> TensorPayload | None:
    """Tensor after the one that ends at ``end``, with which the frame has to end."""
    if (rows, features, nbytes, codec) == NO_TENSOR:
        if end != len(frame):
            raise bad_size(
                StepBegin, end - TWO_TENSORS_HEADER_NBYTES, len(frame) - TWO_TENSORS_HEADER_NBYTES
            )
        return None
    if rows != step_rows:
        raise RemoteProtocolError(f"StepBegin: opening has {rows} rows in a step of {step_rows}")
    if features > limits.max_features:
        raise bad_shape(StepBegin, rows, features, limits)
    start = end + -end % ALIGNMENT
    if start + nbytes != len(frame):
        raise bad_size(
            StepBegin,
            start - TWO_TENSORS_HEADER_NBYTES + nbytes,
            len(frame) - TWO_TENSORS_HEADER_NBYTES,
        )
    if any(frame[end:start]):
        raise RemoteProtocolError("StepBegin: the padding between two tensors is not zero")
    return TensorPayload(codec_name(codec), (rows, features), frame[start:])


# Each encoder takes the type it is listed under, which a dict cannot say.
ENCODERS: dict[type[Message], Callable[[Any], tuple[Buffer, ...]]] = {
    StepBegin: _encode_step_begin,
    ExchangeRequest: _encode_exchange_request,
    ExchangeReply: _encode_exchange_reply,
    StepEnd: _encode_step_end,
}
"""Return the parts of one frame; raise LocalProtocolError."""

DECODERS: dict[type[Message], Callable[[memoryview, WireLimits], Message]] = {
    StepBegin: _decode_step_begin,
    ExchangeRequest: _decode_exchange_request,
    ExchangeReply: _decode_exchange_reply,
    StepEnd: _decode_step_end,
}
"""Return the message in a frame; raise RemoteProtocolError."""
