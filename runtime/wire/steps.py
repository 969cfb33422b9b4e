"""The four messages of a step, sent for every exchange of every token: fixed headers.

Their layout is in ``codec.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.runtime.wire.control import MAX_CODEC_CHARS, check_codec_name
from privatelora.runtime.wire.messages import (
    PROTOCOL_VERSION,
    Buffer,
    ExchangeReply,
    ExchangeRequest,
    Message,
    OutputRows,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.runtime.wire.prelude import (
    ID_BITS,
    PRELUDE,
    TYPES,
    MalformedError,
    WireLimits,
    check_prelude,
)

ALIGNMENT = 16

# The prelude of a step message never varies, so it is read as one number and compared.
_ONE_TENSOR = struct.Struct("<QQQIIIIQ16s")
_TWO_TENSORS = struct.Struct("<QQQIIIIQ16sIIQ16s")
ONE_TENSOR_HEADER_NBYTES = _ONE_TENSOR.size
TWO_TENSORS_HEADER_NBYTES = _TWO_TENSORS.size


def _prelude(kind: type[Message], layout: struct.Struct) -> int:
    header_nbytes = layout.size - PRELUDE.size
    prelude = PRELUDE.pack(TYPES[kind], 0, PROTOCOL_VERSION, header_nbytes)
    return int.from_bytes(prelude, "little")


_STEP_BEGIN = _prelude(StepBegin, _TWO_TENSORS)
_EXCHANGE_REQUEST = _prelude(ExchangeRequest, _ONE_TENSOR)
_EXCHANGE_REPLY = _prelude(ExchangeReply, _ONE_TENSOR)
_STEP_END = _prelude(StepEnd, _ONE_TENSOR)
_NO_TENSOR = (0, 0, 0, bytes(MAX_CODEC_CHARS))
_OUTPUT_ROWS = tuple(OutputRows)


@lru_cache(maxsize=64)
def _codec_field(name: str) -> bytes:
    try:
        return check_codec_name(name).encode("ascii")
    except MalformedError as error:
        raise LocalProtocolError(f"a tensor cannot be sent: {error}") from error


@lru_cache(maxsize=64)
def _codec_name(field: bytes) -> str:
    try:
        return check_codec_name(field.rstrip(b"\0").decode("ascii"))
    except (UnicodeDecodeError, MalformedError) as error:
        raise RemoteProtocolError(f"a tensor names no codec: {field!r}") from error


def _nbytes(data: Buffer) -> int:
    """Size of ``data``, which transports may treat as a plain run of bytes."""
    if isinstance(data, memoryview) and not (
        data.ndim == 1 and data.itemsize == 1 and data.c_contiguous
    ):
        raise LocalProtocolError("tensor data must be a contiguous memoryview of single bytes")
    return len(data)


def _out_of_range(message: str, error: Exception) -> LocalProtocolError:
    return LocalProtocolError(f"{message} cannot be sent: a number is out of range ({error})")


def _encode_one(
    prelude: int, session_id: int, step_id: int, point: int, tensor: TensorPayload
) -> tuple[Buffer, ...]:
    data = tensor.data
    rows, features = tensor.shape
    try:
        if (session_id | step_id) >> ID_BITS:
            raise struct.error(f"session {session_id}, step {step_id}")
        header = _ONE_TENSOR.pack(
            prelude,
            session_id,
            step_id,
            point,
            0,
            rows,
            features,
            _nbytes(data),
            _codec_field(tensor.codec),
        )
    except struct.error as error:
        raise _out_of_range("a step message", error) from error
    return header, data


def _encode_exchange_request(message: ExchangeRequest) -> tuple[Buffer, ...]:
    return _encode_one(
        _EXCHANGE_REQUEST, message.session_id, message.step_id, message.point, message.z
    )


def _encode_exchange_reply(message: ExchangeReply) -> tuple[Buffer, ...]:
    return _encode_one(
        _EXCHANGE_REPLY, message.session_id, message.step_id, message.point, message.y
    )


def _encode_step_end(message: StepEnd) -> tuple[Buffer, ...]:
    return _encode_one(_STEP_END, message.session_id, message.step_id, 0, message.hidden_states)


def _encode_step_begin(message: StepBegin) -> tuple[Buffer, ...]:
    hidden_states, opening = message.hidden_states, message.opening
    rows, features = hidden_states.shape
    hidden_nbytes = _nbytes(hidden_states.data)
    if rows < 1:
        raise LocalProtocolError("StepBegin cannot be sent: a step of no rows")
    if opening is not None and opening.shape[0] != rows:
        raise LocalProtocolError(
            f"StepBegin cannot be sent: opening has {opening.shape[0]} rows in a step of {rows}"
        )
    try:
        if (message.session_id | message.step_id) >> ID_BITS:
            raise struct.error(f"session {message.session_id}, step {message.step_id}")
        header = _TWO_TENSORS.pack(
            _STEP_BEGIN,
            message.session_id,
            message.step_id,
            message.position,
            message.output_rows,
            rows,
            features,
            hidden_nbytes,
            _codec_field(hidden_states.codec),
            *(
                _NO_TENSOR
                if opening is None
                else (*opening.shape, _nbytes(opening.data), _codec_field(opening.codec))
            ),
        )
    except struct.error as error:
        raise _out_of_range("StepBegin", error) from error
    if opening is None:
        return header, hidden_states.data
    padding = bytes(-hidden_nbytes % ALIGNMENT)
    return header, hidden_states.data, padding, opening.data


def _decode_one(
    frame: memoryview, limits: WireLimits, kind: type[Message], prelude: int
) -> tuple[int, int, int, TensorPayload]:
    if len(frame) < ONE_TENSOR_HEADER_NBYTES:
        raise _truncated(frame, kind, ONE_TENSOR_HEADER_NBYTES)
    found, session_id, step_id, point, zero, rows, features, nbytes, codec = (
        _ONE_TENSOR.unpack_from(frame)
    )
    if found != prelude:
        check_prelude(frame, kind, ONE_TENSOR_HEADER_NBYTES - PRELUDE.size)
    if zero:
        raise RemoteProtocolError(f"{kind.__name__}: the reserved field is {zero} instead of 0")
    if (session_id | step_id) >> ID_BITS:
        raise _bad_id(kind)
    if rows > limits.max_rows or features > limits.max_features:
        raise _bad_shape(kind, rows, features, limits)
    if nbytes != len(frame) - ONE_TENSOR_HEADER_NBYTES:
        raise _bad_size(kind, nbytes, len(frame) - ONE_TENSOR_HEADER_NBYTES)
    data = frame[ONE_TENSOR_HEADER_NBYTES:]
    return session_id, step_id, point, TensorPayload(_codec_name(codec), (rows, features), data)


def _decode_exchange_request(frame: memoryview, limits: WireLimits) -> ExchangeRequest:
    return ExchangeRequest(*_decode_one(frame, limits, ExchangeRequest, _EXCHANGE_REQUEST))


def _decode_exchange_reply(frame: memoryview, limits: WireLimits) -> ExchangeReply:
    return ExchangeReply(*_decode_one(frame, limits, ExchangeReply, _EXCHANGE_REPLY))


def _decode_step_end(frame: memoryview, limits: WireLimits) -> StepEnd:
    session_id, step_id, point, hidden_states = _decode_one(frame, limits, StepEnd, _STEP_END)
    if point:
        raise RemoteProtocolError(f"StepEnd: the reserved field is {point} instead of 0")
    return StepEnd(session_id, step_id, hidden_states)


def _decode_step_begin(frame: memoryview, limits: WireLimits) -> StepBegin:
    if len(frame) < TWO_TENSORS_HEADER_NBYTES:
        raise _truncated(frame, StepBegin, TWO_TENSORS_HEADER_NBYTES)
    prelude, session_id, step_id, position, output_rows, rows, features, nbytes, codec, *opening = (
        _TWO_TENSORS.unpack_from(frame)
    )
    if prelude != _STEP_BEGIN:
        check_prelude(frame, StepBegin, TWO_TENSORS_HEADER_NBYTES - PRELUDE.size)
    if (session_id | step_id) >> ID_BITS:
        raise _bad_id(StepBegin)
    if output_rows >= len(_OUTPUT_ROWS):
        raise RemoteProtocolError(f"StepBegin: output_rows {output_rows} does not exist")
    if rows > limits.max_rows or features > limits.max_features:
        raise _bad_shape(StepBegin, rows, features, limits)
    if not rows:
        raise RemoteProtocolError("StepBegin: a step of no rows")
    end = TWO_TENSORS_HEADER_NBYTES + nbytes
    return StepBegin(
        session_id,
        step_id,
        position,
        _OUTPUT_ROWS[output_rows],
        TensorPayload(_codec_name(codec), (rows, features), frame[TWO_TENSORS_HEADER_NBYTES:end]),
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
    if (rows, features, nbytes, codec) == _NO_TENSOR:
        if end != len(frame):
            raise _bad_size(
                StepBegin, end - TWO_TENSORS_HEADER_NBYTES, len(frame) - TWO_TENSORS_HEADER_NBYTES
            )
        return None
    if rows != step_rows:
        raise RemoteProtocolError(f"StepBegin: opening has {rows} rows in a step of {step_rows}")
    if features > limits.max_features:
        raise _bad_shape(StepBegin, rows, features, limits)
    start = end + -end % ALIGNMENT
    if start + nbytes != len(frame):
        raise _bad_size(
            StepBegin,
            start - TWO_TENSORS_HEADER_NBYTES + nbytes,
            len(frame) - TWO_TENSORS_HEADER_NBYTES,
        )
    if any(frame[end:start]):
        raise RemoteProtocolError("StepBegin: the padding between two tensors is not zero")
    return TensorPayload(_codec_name(codec), (rows, features), frame[start:])


def _truncated(frame: memoryview, kind: type[Message], needed: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"{kind.__name__} of {len(frame)} bytes is cut off: its header alone takes {needed}"
    )


def _bad_id(kind: type[Message]) -> RemoteProtocolError:
    return RemoteProtocolError(f"{kind.__name__}: an id is not below 2**{ID_BITS}")


def _bad_shape(
    kind: type[Message], rows: int, features: int, limits: WireLimits
) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"{kind.__name__}: a tensor of {rows} x {features} is too large, at most "
        f"{limits.max_rows} x {limits.max_features} is accepted"
    )


def _bad_size(kind: type[Message], declared: int, found: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"{kind.__name__} declares {declared} bytes of tensor data, the frame has {found}"
    )


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
