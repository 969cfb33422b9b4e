"""What frames with tensors have in common: their fixed headers. The layout is in ``codec.py``."""

from __future__ import annotations

import struct
from functools import lru_cache

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.runtime.wire.control import MAX_CODEC_CHARS, check_codec_name
from privatelora.runtime.wire.messages import PROTOCOL_VERSION, Buffer, Message, TensorPayload
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
ONE_TENSOR = struct.Struct("<QQQIIIIQ16s")
TWO_TENSORS = struct.Struct("<QQQIIIIQ16sIIQ16s")
ONE_TENSOR_HEADER_NBYTES = ONE_TENSOR.size
TWO_TENSORS_HEADER_NBYTES = TWO_TENSORS.size


def prelude_of(kind: type[Message], layout: struct.Struct) -> int:
    """The first 8 bytes of a ``kind`` as the number that ``layout`` begins with."""
    header_nbytes = layout.size - PRELUDE.size
    prelude = PRELUDE.pack(TYPES[kind], 0, PROTOCOL_VERSION, header_nbytes)
    return int.from_bytes(prelude, "little")


NO_TENSOR = (0, 0, 0, bytes(MAX_CODEC_CHARS))


@lru_cache(maxsize=64)
def codec_field(name: str) -> bytes:
    """A codec's name as it is sent; LocalProtocolError if it is none."""
    try:
        return check_codec_name(name).encode("ascii")
    except MalformedError as error:
        raise LocalProtocolError(f"a tensor cannot be sent: {error}") from error


@lru_cache(maxsize=64)
def codec_name(field: bytes) -> str:
    """A codec's name as it came; RemoteProtocolError if it is none."""
    try:
        return check_codec_name(field.rstrip(b"\0").decode("ascii"))
    except (UnicodeDecodeError, MalformedError) as error:
        raise RemoteProtocolError(f"a tensor names no codec: {field!r}") from error


def data_nbytes(data: Buffer) -> int:
    """Size of ``data``, which transports may treat as a plain run of bytes."""
    if isinstance(data, memoryview) and not (
        data.ndim == 1 and data.itemsize == 1 and data.c_contiguous
    ):
        raise LocalProtocolError("tensor data must be a contiguous memoryview of single bytes")
    return len(data)


def out_of_range(message: str, error: Exception) -> LocalProtocolError:
    """What to raise for a header that ``struct`` cannot pack."""
    return LocalProtocolError(f"{message} cannot be sent: a number is out of range ({error})")


def encode_one(
    prelude: int, session_id: int, step_id: int, point: int, tensor: TensorPayload
) -> tuple[Buffer, ...]:
    """The parts of a frame with one tensor; raises LocalProtocolError."""
    data = tensor.data
    rows, features = tensor.shape
    try:
        if (session_id | step_id) >> ID_BITS:
            raise struct.error(f"session {session_id}, step {step_id}")
        header = ONE_TENSOR.pack(
            prelude,
            session_id,
            step_id,
            point,
            0,
            rows,
            features,
            data_nbytes(data),
            codec_field(tensor.codec),
        )
    except struct.error as error:
        raise out_of_range("a step message", error) from error
    return header, data


def decode_one(
    frame: memoryview, limits: WireLimits, kind: type[Message], prelude: int
) -> tuple[int, int, int, TensorPayload]:
    """Session, step, point and tensor of such a frame; raises RemoteProtocolError."""
    if len(frame) < ONE_TENSOR_HEADER_NBYTES:
        raise truncated(frame, kind, ONE_TENSOR_HEADER_NBYTES)
    found, session_id, step_id, point, zero, rows, features, nbytes, codec = ONE_TENSOR.unpack_from(
        frame
    )
    if found != prelude:
        check_prelude(frame, kind, ONE_TENSOR_HEADER_NBYTES - PRELUDE.size)
    if zero:
        raise RemoteProtocolError(f"{kind.__name__}: the reserved field is {zero} instead of 0")
    if (session_id | step_id) >> ID_BITS:
        raise bad_id(kind)
    if rows > limits.max_rows or features > limits.max_features:
        raise bad_shape(kind, rows, features, limits)
    if nbytes != len(frame) - ONE_TENSOR_HEADER_NBYTES:
        raise bad_size(kind, nbytes, len(frame) - ONE_TENSOR_HEADER_NBYTES)
    data = frame[ONE_TENSOR_HEADER_NBYTES:]
    return session_id, step_id, point, TensorPayload(codec_name(codec), (rows, features), data)


def truncated(frame: memoryview, kind: type[Message], needed: int) -> RemoteProtocolError:
    """What to raise for a frame that is shorter than its header."""
    return RemoteProtocolError(
        f"{kind.__name__} of {len(frame)} bytes is cut off: its header alone takes {needed}"
    )


def bad_id(kind: type[Message]) -> RemoteProtocolError:
    """What to raise for the id of a session or step that is out of range."""
    return RemoteProtocolError(f"{kind.__name__}: an id is not below 2**{ID_BITS}")


def bad_shape(
    kind: type[Message], rows: int, features: int, limits: WireLimits
) -> RemoteProtocolError:
    """What to raise for a tensor beyond ``limits``."""
    return RemoteProtocolError(
        f"{kind.__name__}: a tensor of {rows} x {features} is too large, at most "
        f"{limits.max_rows} x {limits.max_features} is accepted"
    )


def bad_size(kind: type[Message], declared: int, found: int) -> RemoteProtocolError:
    """What to raise where tensors do not end with the frame."""
    return RemoteProtocolError(
        f"{kind.__name__} declares {declared} bytes of tensor data, the frame has {found}"
    )
