"""Errors as they cross the wire."""

from __future__ import annotations

import pytest

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
from privatelora.runtime.wire.codec import decode
from privatelora.runtime.wire.failures import error_reply, exception_from
from privatelora.runtime.wire.messages import ErrorCode, ErrorReply
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.transports.flow import again
from tests.wire.samples import frame_of


def across(error: PrivateLoRAError) -> PrivateLoRAError:
    """What the other end raises."""
    reply = decode(frame_of(error_reply(error, 7)), WireLimits())
    assert isinstance(reply, ErrorReply)
    return exception_from(reply)


@pytest.mark.parametrize(
    ("raised", "other"),
    [
        (VersionMismatch, VersionMismatch),
        (PartitionError, PartitionError),
        (RemoteProtocolError, LocalProtocolError),
        (LocalProtocolError, PrivateLoRAError),
        (SessionEvicted, SessionEvicted),
        (CapacityError, CapacityError),
        (RequestError, RequestError),
        (AuthError, AuthError),
    ],
)
def test_the_kind_and_the_message_arrive(
    raised: type[PrivateLoRAError], other: type[PrivateLoRAError]
) -> None:
    error = across(raised("why not"))
    assert type(error) is other
    assert str(error) == "why not"


@pytest.mark.parametrize("kind", [CapacityError, SessionEvicted])
def test_when_to_try_again_arrives(kind: type[CapacityError]) -> None:
    for sent, got in ((None, None), (2.5, 2.5), (0.0, 0.0), (1e9, 86_400.0)):
        error = across(kind("full", sent))
        assert isinstance(error, CapacityError)
        assert error.retry_after_s == got
        copy = again(error)
        assert isinstance(copy, CapacityError)
        assert copy.retry_after_s == got


@pytest.mark.parametrize(
    "hint", ["", "soon", "nan", "inf", "-1", "1e3", "9" * 400, "1.", " 1", "٣"]
)
def test_a_hint_that_is_none_is_left_out(hint: str) -> None:
    reply = ErrorReply(ErrorCode.CAPACITY, "full", 7, {"retry_after_s": hint, "limit": "8"})
    error = exception_from(reply)
    assert isinstance(error, CapacityError)
    assert error.retry_after_s is None
