"""The messages that carry no tensors, whose headers are MessagePack arrays.

    Hello          [role, software, model, plan, basis, [codec, ...], max_frame_nbytes,
                    max_positions, max_sessions, [capability, ...], token or nil]
    ErrorReply     [code, message, session_id or nil, {name: text, ...}]
    OpenSession    [session_id, max_positions, hidden_codec, exchange_codec, resume or nil,
                    training]
    SessionOpened  [session_id, max_positions, num_positions, resume or nil]
    CloseSession   [session_id]
    SessionClosed  [session_id]
    Ping           [nonce]
    Pong           [nonce]
    DropStep       [session_id, step_id]

The same parsers check what a peer sent and what this end is about to send. Bounds on numbers
and texts are the constants below.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

import msgpack

from privatelora.errors import LocalProtocolError, RemoteProtocolError, VersionMismatch
from privatelora.runtime.wire.messages import (
    PROTOCOL_VERSION,
    Buffer,
    CloseSession,
    DropStep,
    ErrorCode,
    ErrorReply,
    Fingerprints,
    Hello,
    OpenSession,
    Ping,
    Pong,
    Role,
    SessionClosed,
    SessionOpened,
)
from privatelora.runtime.wire.prelude import (
    ID_BITS,
    PRELUDE,
    TYPES,
    MalformedError,
    WireLimits,
    check_prelude,
)

MAGIC = b"PrivLoRA"
MAX_HEADER_NBYTES = 64 * 2**10
MAX_CODEC_CHARS = 16
MAX_NAME_CHARS = 64
MAX_SOFTWARE_CHARS = 128
MAX_MESSAGE_CHARS = 4096
MAX_DETAIL_CHARS = 512
MAX_TOKEN_CHARS = 256
MAX_CODECS = 32
MAX_CAPABILITIES = 64
MAX_DETAILS = 16
MIN_FRAME_NBYTES = 2**17
"""Every end accepts frames up to at least this size, so control messages always fit."""

# msgpack ships without annotations.
_packb: Callable[..., bytes] = msgpack.packb
_unpackb: Callable[..., object] = msgpack.unpackb  # type: ignore[attr-defined]

_MAX_UINT32 = 2**32 - 1
_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]*", re.ASCII)
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line separators, and what UTF-8 cannot hold."""
_TOKEN = re.compile(r"[!-~]+", re.ASCII)
"""Printable ASCII without space."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)

ControlMessage = (
    Hello
    | ErrorReply
    | OpenSession
    | SessionOpened
    | CloseSession
    | SessionClosed
    | Ping
    | Pong
    | DropStep
)
_E = TypeVar("_E", bound=Enum)


def _unpack(header: memoryview) -> list[object]:
    try:
        fields = _unpackb(
            header,
            raw=False,
            strict_map_key=True,
            max_str_len=4 * MAX_MESSAGE_CHARS,
            max_bin_len=0,
            max_array_len=MAX_CAPABILITIES,
            max_map_len=MAX_DETAILS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise MalformedError(f"the header is not the MessagePack expected: {reason}") from error
    if type(fields) is not list:
        raise MalformedError("the header is not a MessagePack array")
    return fields


def check_codec_name(value: object) -> str:
    """Return a payload codec name, or raise MalformedError."""
    return _name(value, "codec", MAX_CODEC_CHARS)


def check_token(value: object, what: str = "token") -> str:
    """Return an edge's or a session's token, or raise MalformedError, which does not repeat it."""
    if type(value) is not str or len(value) > MAX_TOKEN_CHARS or not _TOKEN.fullmatch(value):
        raise MalformedError(
            f"{what} is not 1 to {MAX_TOKEN_CHARS} printable ASCII characters without white space"
        )
    return value


def _resume(value: object) -> str | None:
    return None if value is None else check_token(value, "resume")


def _take(fields: list[object], count: int) -> list[object]:
    if len(fields) != count:
        raise MalformedError(f"{len(fields)} fields instead of {count}")
    return fields


def _int(value: object, what: str, low: int, high: int) -> int:
    # bool is an int to isinstance, and no number on the wire.
    if type(value) is not int or not low <= value <= high:
        raise MalformedError(f"{what} is not an integer from {low} to {high}")
    return value


def _id(value: object, what: str = "session_id") -> int:
    return _int(value, what, 0, 2**ID_BITS - 1)


def _text(value: object, what: str, max_chars: int) -> str:
    # What arrives here ends up on a person's terminal.
    if type(value) is not str or len(value) > max_chars or _UNSAFE.search(value):
        raise MalformedError(
            f"{what} is not a string of at most {max_chars} characters without control characters"
        )
    return value


def _name(value: object, what: str, max_chars: int = MAX_NAME_CHARS) -> str:
    if type(value) is not str or len(value) > max_chars or not _NAME.fullmatch(value):
        raise MalformedError(
            f"{what} is not a name of at most {max_chars} characters out of a-z 0-9 _ . + -"
        )
    return value


def _names(value: object, what: str, max_count: int, max_chars: int) -> tuple[str, ...]:
    if type(value) is not list or len(value) > max_count:
        raise MalformedError(f"{what} is not an array of at most {max_count} names")
    return tuple(_name(item, what, max_chars) for item in value)


def _sha256(value: object, what: str) -> str:
    if type(value) is not str or not _SHA256.fullmatch(value):
        raise MalformedError(f"the {what} fingerprint is not 64 lower-case hexadecimal digits")
    return value


def _member(kind: type[_E], value: object, what: str) -> _E:
    if type(value) is str:
        for member in kind:
            if member.value == value:
                return member
    raise MalformedError(f"{what} is none of {', '.join(str(m.value) for m in kind)}")


def _parse_hello(fields: list[object]) -> Hello:
    role, software, model, plan, basis, codecs, *numbers, capabilities, token = _take(fields, 11)
    frame, positions, sessions = numbers
    sender = _member(Role, role, "role")
    if token is not None and sender is not Role.EDGE:
        raise MalformedError("token is for edges to send")
    return Hello(
        role=sender,
        software=_text(software, "software", MAX_SOFTWARE_CHARS),
        fingerprints=Fingerprints(
            _sha256(model, "model"), _sha256(plan, "plan"), _sha256(basis, "basis")
        ),
        codecs=_names(codecs, "codecs", MAX_CODECS, MAX_CODEC_CHARS),
        max_frame_nbytes=_int(frame, "max_frame_nbytes", MIN_FRAME_NBYTES, 2**ID_BITS - 1),
        max_positions=_int(positions, "max_positions", 0, _MAX_UINT32),
        max_sessions=_int(sessions, "max_sessions", 0, _MAX_UINT32),
        capabilities=_names(capabilities, "capabilities", MAX_CAPABILITIES, MAX_NAME_CHARS),
        token=None if token is None else check_token(token),
    )


def _parse_error_reply(fields: list[object]) -> ErrorReply:
    code, message, session_id, details = _take(fields, 4)
    if type(details) is not dict or len(details) > MAX_DETAILS:
        raise MalformedError(f"details is not a map of at most {MAX_DETAILS} entries")
    return ErrorReply(
        code=_member(ErrorCode, code, "code"),
        message=_text(message, "message", MAX_MESSAGE_CHARS),
        session_id=None if session_id is None else _id(session_id),
        details={
            _name(key, "details"): _text(value, "details", MAX_DETAIL_CHARS)
            for key, value in details.items()
        },
    )


def _parse_open_session(fields: list[object]) -> OpenSession:
    session_id, max_positions, hidden_codec, exchange_codec, resume, training = _take(fields, 6)
    if type(training) is not bool:
        raise MalformedError("training is neither true nor false")
    if training and resume is not None:
        raise MalformedError("resume in a session for training, which has nothing to resume")
    return OpenSession(
        _id(session_id),
        _int(max_positions, "max_positions", 1, _MAX_UINT32),
        check_codec_name(hidden_codec),
        check_codec_name(exchange_codec),
        _resume(resume),
        training,
    )


def _parse_session_opened(fields: list[object]) -> SessionOpened:
    session_id, max_positions, num_positions, resume = _take(fields, 4)
    most = _int(max_positions, "max_positions", 1, _MAX_UINT32)
    return SessionOpened(
        _id(session_id),
        most,
        _int(num_positions, "num_positions", 0, most),
        _resume(resume),
    )


def _parse_close_session(fields: list[object]) -> CloseSession:
    return CloseSession(_id(_take(fields, 1)[0]))


def _parse_session_closed(fields: list[object]) -> SessionClosed:
    return SessionClosed(_id(_take(fields, 1)[0]))


def _parse_ping(fields: list[object]) -> Ping:
    return Ping(_id(_take(fields, 1)[0], "nonce"))


def _parse_pong(fields: list[object]) -> Pong:
    return Pong(_id(_take(fields, 1)[0], "nonce"))


def _parse_drop_step(fields: list[object]) -> DropStep:
    session_id, step_id = _take(fields, 2)
    return DropStep(_id(session_id), _id(step_id, "step_id"))


PARSERS: dict[type[ControlMessage], Callable[[list[object]], ControlMessage]] = {
    Hello: _parse_hello,
    ErrorReply: _parse_error_reply,
    OpenSession: _parse_open_session,
    SessionOpened: _parse_session_opened,
    CloseSession: _parse_close_session,
    SessionClosed: _parse_session_closed,
    Ping: _parse_ping,
    Pong: _parse_pong,
    DropStep: _parse_drop_step,
}
"""Message types of this module, and what makes them from the fields of a header."""
_BY_NUMBER = {TYPES[kind]: (kind, parse) for kind, parse in PARSERS.items()}
_RECOGNISABLE = (TYPES[Hello], TYPES[ErrorReply])


def _fields_of(message: ControlMessage) -> list[object]:
    match message:
        case Hello():
            prints = message.fingerprints
            return [
                message.role.value,
                message.software,
                prints.model,
                prints.plan,
                prints.basis,
                list(message.codecs),
                message.max_frame_nbytes,
                message.max_positions,
                message.max_sessions,
                list(message.capabilities),
                message.token,
            ]
        case ErrorReply():
            return [
                message.code.value,
                _one_line(message.message, MAX_MESSAGE_CHARS),
                message.session_id,
                {k: _one_line(v, MAX_DETAIL_CHARS) for k, v in message.details.items()},
            ]
        case OpenSession():
            return [
                message.session_id,
                message.max_positions,
                message.hidden_codec,
                message.exchange_codec,
                message.resume,
                message.training,
            ]
        case SessionOpened():
            return [
                message.session_id,
                message.max_positions,
                message.num_positions,
                message.resume,
            ]
        case CloseSession() | SessionClosed():
            return [message.session_id]
        case Ping() | Pong():
            return [message.nonce]
        case DropStep():
            return [message.session_id, message.step_id]


def _one_line(text: str, max_chars: int) -> str:
    text = _UNSAFE.sub(" ", text)
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def encode_control(message: ControlMessage) -> tuple[Buffer, ...]:
    """Return the frame, in one part. Raises LocalProtocolError for a message out of bounds."""
    kind = type(message)
    fields = _fields_of(message)
    try:
        PARSERS[kind](fields)
    except MalformedError as error:
        raise LocalProtocolError(f"{kind.__name__} cannot be sent: {error}") from error
    header = _packb(fields)
    if TYPES[kind] in _RECOGNISABLE:
        header = MAGIC + header
    return (PRELUDE.pack(TYPES[kind], 0, PROTOCOL_VERSION, len(header)) + header,)


def require_version(frame: memoryview) -> None:
    """Raise VersionMismatch for a frame by which a peer of another version can be told."""
    start = PRELUDE.size
    if frame[0] in _RECOGNISABLE and frame[start : start + len(MAGIC)] == MAGIC:
        version = int.from_bytes(frame[2:4], "little")
        if version != PROTOCOL_VERSION:
            raise VersionMismatch(
                f"the peer speaks protocol version {version}, this end version "
                f"{PROTOCOL_VERSION}: install the same PrivateLoRA release on both"
            )


def decode_control(frame: memoryview, limits: WireLimits) -> ControlMessage:
    """Return the message. Raises VersionMismatch or RemoteProtocolError."""
    number = frame[0]
    kind, parse = _BY_NUMBER[number]
    start = PRELUDE.size
    if number in _RECOGNISABLE:
        if frame[start : start + len(MAGIC)] != MAGIC:
            raise RemoteProtocolError(
                f"{kind.__name__} lacks the mark of this protocol; is the peer a PrivateLoRA "
                "program?"
            )
        start += len(MAGIC)
        require_version(frame)
    header_nbytes = len(frame) - PRELUDE.size
    if header_nbytes > MAX_HEADER_NBYTES:
        raise RemoteProtocolError(
            f"{kind.__name__} of {len(frame)} bytes is too large: its header has at most "
            f"{MAX_HEADER_NBYTES}"
        )
    check_prelude(frame, kind, header_nbytes)
    try:
        return parse(_unpack(frame[start:]))
    except MalformedError as error:
        raise RemoteProtocolError(f"{kind.__name__}: {error}") from error
