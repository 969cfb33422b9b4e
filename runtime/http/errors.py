"""Errors as OpenAI's API states them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from privatelora.errors import (
    CapacityError,
    CloudDraining,
    ConnectError,
    ConnectionClosed,
    PrivateLoRAError,
    RequestError,
    TransportError,
    TransportTimeout,
    UnknownModel,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
RETRY_AFTER_S = 1.0
FIELDS = {"json_schema": "response_format", "logit_bias": "logit_bias"}
"""What messages of RequestError begin with -> the field of the request."""


class ApiError(Exception):
    """An error for whoever sent the request. It ends at the response and is not one of the tree.

    ``param``: the field of the request that is wrong. ``code``: for programs to tell errors apart.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """As an HTTP response."""
        return json_response(self.body, self.status, self.headers)


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


def json_bytes(value: object) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response of JSON."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def internal_error() -> ApiError:
    """What a defect here looks like from outside: nothing of it is shown."""
    return ApiError("internal error; see this edge's log", status=500, kind=SERVER_ERROR)


def as_api_error(error: PrivateLoRAError) -> ApiError:
    """What an error of this package is over HTTP: whose fault it is, and whether to try again."""
    message = " ".join(str(error).split())
    if isinstance(error, UnknownModel):
        return ApiError(message, status=404, param="model", code="model_not_found")
    if isinstance(error, RequestError):
        return ApiError(message, param=FIELDS.get(message.partition(":")[0]))
    if isinstance(error, ConnectError | ConnectionClosed | CloudDraining):
        return ApiError(message, status=503, kind=SERVER_ERROR, code="cloud_unreachable")
    if isinstance(error, CapacityError):
        return too_many(message, error.retry_after_s or RETRY_AFTER_S)
    if isinstance(error, TransportTimeout):
        return ApiError(message, status=504, kind=SERVER_ERROR, code="cloud_timeout")
    if isinstance(error, TransportError):
        return ApiError(message, status=502, kind=SERVER_ERROR, code="cloud_unreachable")
    # ProtocolError, AuthError, PartitionError, ConfigError: the two ends do not fit together.
    return ApiError(message, status=502, kind=SERVER_ERROR, code="cloud_error")


def too_many(message: str, retry_after_s: float) -> ApiError:
    """A limit is reached; in some seconds it may not be."""
    return ApiError(
        message,
        status=429,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(math.ceil(retry_after_s))},
    )


def first_problem(errors: list[Any]) -> ApiError:
    """The first thing that pydantic refused (``ValidationError.errors()``), with its field."""
    # Of a field that may be several things all are tried: the one that got furthest is meant.
    first = errors[0]["loc"][:1]
    tried = [error for error in errors if error["loc"][:1] == first]
    path = max((_path(error["loc"]) for error in tried), key=len)
    meant = [error for error in tried if _path(error["loc"]) == path]
    reasons = dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in meant)
    message = " or ".join(reasons)
    if path:
        message = f"{path}: {message}"
    else:  # a rule about several fields begins with the name of the one that breaks it
        path = message.partition(":")[0]
    missing = meant[0]["type"] == "missing"
    code = "missing_required_parameter" if missing else "invalid_value"
    return ApiError(message, param=path, code=code)


def _path(location: tuple[int | str, ...]) -> str:
    """``messages[0].content`` from pydantic's location; the names of alternatives left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            path += f".{part}" if path else part
    return path
