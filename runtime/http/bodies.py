"""From the bytes of a request to what it asks for, or to one clear error."""

from __future__ import annotations

import json
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from privatelora.runtime.http.errors import ApiError, ClientGone, first_problem

Body = TypeVar("Body", bound=BaseModel)


async def read_request(request: Request, model: type[Body], max_nbytes: int) -> Body:
    """The body as ``model``. Raises ApiError, or ClientGone if it never came."""
    value = parse_json(await read_body(request, max_nbytes))
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise first_problem(problems) from None


async def read_body(request: Request, max_nbytes: int) -> bytes:
    """All bytes of the body, if they are no more than ``max_nbytes``."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError("compressed bodies are not supported; send plain JSON", status=415)
    announced = request.headers.get("content-length", "0")
    if len(announced) > 15 or int(announced) > max_nbytes:  # h11 let only digits through
        raise _too_large(max_nbytes)
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_nbytes:
                raise _too_large(max_nbytes)
    except ClientDisconnect as error:
        raise ClientGone from error
    return bytes(body)


def parse_json(body: bytes) -> object:
    """JSON in UTF-8; ApiError for everything that Python takes and JSON does not have."""
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(
            f"the body is not UTF-8 at byte {error.start}", code="invalid_json"
        ) from None
    except RecursionError:
        raise ApiError("the body is nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(
            f"the body is not JSON at {where}: {error.msg}", code="invalid_json"
        ) from None
    except ValueError:  # an integer with thousands of digits
        raise ApiError(
            "the body holds a number with too many digits", code="invalid_json"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(f"the body is not JSON: {name} is no number there", code="invalid_json")


def _too_large(max_nbytes: int) -> ApiError:
    return ApiError(
        f"the body is larger than {max_nbytes} bytes (http.max_body_mib in this edge's settings)",
        status=413,
        code="request_too_large",
    )
