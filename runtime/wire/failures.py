"""Errors as they cross the wire: an exception at one end, an ErrorReply, one at the other."""

from __future__ import annotations

import re

from privatelora.errors import (
    AuthError,
    CapacityError,
    CloudDraining,
    LocalProtocolError,
    PartitionError,
    PrivateLoRAError,
    RemoteProtocolError,
    RequestError,
    SessionEvicted,
    VersionMismatch,
)
from privatelora.runtime.wire.messages import ErrorCode, ErrorReply

RETRY_AFTER = "retry_after_s"
"""In the details of ``capacity`` and ``evicted``: when trying again is worth it."""
MAX_RETRY_AFTER_S = 86_400.0
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)

# What one end raises, the code it sends, what the other end raises. Ours is their fault turned
# round: what the receiver of an ErrorReply did wrong is a defect at its own end.
_CODES: tuple[tuple[type[PrivateLoRAError], ErrorCode, type[PrivateLoRAError]], ...] = (
    (VersionMismatch, ErrorCode.VERSION, VersionMismatch),
    (PartitionError, ErrorCode.MISMATCH, PartitionError),
    (RemoteProtocolError, ErrorCode.PROTOCOL, LocalProtocolError),
    (SessionEvicted, ErrorCode.EVICTED, SessionEvicted),
    (CloudDraining, ErrorCode.DRAINING, CloudDraining),
    (CapacityError, ErrorCode.CAPACITY, CapacityError),
    (RequestError, ErrorCode.REQUEST, RequestError),
    (AuthError, ErrorCode.AUTH, AuthError),
    (PrivateLoRAError, ErrorCode.INTERNAL, PrivateLoRAError),
)


def error_reply(error: PrivateLoRAError, session_id: int | None = None) -> ErrorReply:
    """The message that tells the other end of ``error``."""
    code = next(code for kind, code, _ in _CODES if isinstance(error, kind))
    details = {}
    if isinstance(error, CapacityError) and error.retry_after_s is not None:
        details[RETRY_AFTER] = f"{min(error.retry_after_s, MAX_RETRY_AFTER_S):.3f}"
    return ErrorReply(code, str(error), session_id, details)


def exception_from(reply: ErrorReply) -> PrivateLoRAError:
    """The exception an ErrorReply stands for at the end that received it."""
    kind = next(kind for _, code, kind in _CODES if code is reply.code)
    error = kind(reply.message)
    if isinstance(error, CapacityError):
        error.retry_after_s = _seconds(reply.details.get(RETRY_AFTER, ""))
    return error


def _seconds(text: str) -> float | None:
    """A hint is worth no failure: None for what is none."""
    if not _SECONDS.fullmatch(text):
        return None
    return min(float(text), MAX_RETRY_AFTER_S)
