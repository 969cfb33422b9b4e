"""Errors as they cross the wire: an exception at one end, an ErrorReply, one at the other."""

from __future__ import annotations

from privatelora.errors import (
    AuthError,
    CapacityError,
    LocalProtocolError,
    PartitionError,
    PrivateLoRAError,
    RemoteProtocolError,
    RequestError,
    SessionEvicted,
    VersionMismatch,
)
from privatelora.runtime.wire.messages import ErrorCode, ErrorReply

# What one end raises, the code it sends, what the other end raises. Ours is their fault turned
# round: what the receiver of an ErrorReply did wrong is a defect at its own end.
_CODES: tuple[tuple[type[PrivateLoRAError], ErrorCode, type[PrivateLoRAError]], ...] = (
    (VersionMismatch, ErrorCode.VERSION, VersionMismatch),
    (PartitionError, ErrorCode.MISMATCH, PartitionError),
    (RemoteProtocolError, ErrorCode.PROTOCOL, LocalProtocolError),
    (SessionEvicted, ErrorCode.EVICTED, SessionEvicted),
    (CapacityError, ErrorCode.CAPACITY, CapacityError),
    (RequestError, ErrorCode.REQUEST, RequestError),
    (AuthError, ErrorCode.AUTH, AuthError),
    (PrivateLoRAError, ErrorCode.INTERNAL, PrivateLoRAError),
)


def error_reply(error: PrivateLoRAError, session_id: int | None = None) -> ErrorReply:
    """The message that tells the other end of ``error``."""
    code = next(code for kind, code, _ in _CODES if isinstance(error, kind))
    return ErrorReply(code, str(error), session_id)


def exception_from(reply: ErrorReply) -> PrivateLoRAError:
    """The exception an ErrorReply stands for at the end that received it."""
    kind = next(kind for _, code, kind in _CODES if code is reply.code)
    return kind(reply.message)
