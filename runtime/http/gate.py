"""Who may ask: checks that come before every route.

A server on the loopback interface is not private: every web page that a browser on this machine
shows can send it requests. Two checks keep them out when there is no key. A page at
``evil.example`` can let that name point to 127.0.0.1 after it was loaded (DNS rebinding) and is
then of one origin with this server; but the browser still sends ``Host: evil.example``, so only
names of this machine are answered. And a page may send POST requests to 127.0.0.1 itself; it
cannot read the answers, but they cost time and money, and the browser says in ``Origin`` where
they come from. With a key neither helps: no page knows it.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from privatelora.runtime.host_port import is_loopback
from privatelora.runtime.http.defects import log_defect
from privatelora.runtime.http.errors import (
    SERVER_ERROR,
    ApiError,
    ClientGone,
    internal_error,
    too_many,
)
from privatelora.runtime.http.metrics import EdgeMetrics
from privatelora.runtime.http_config import ANY_ORIGIN, HttpConfig
from privatelora.runtime.secret_config import CurrentSecret

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/", "/health/live", "/health/ready")
OPEN_PREFIX = "/page/"
"""The page itself holds nothing private; it asks for the key and then uses the API."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
NO_ROUTE = "none"
RETRY_AFTER_S = 1.0


class Gate:
    """The outermost application: refuses, or hands over to ``app``, which has the routes."""

    def __init__(
        self, app: ASGIApp, config: HttpConfig, api_key: CurrentSecret | None, metrics: EdgeMetrics
    ) -> None:
        self._app = app
        self._config = config
        self._key = api_key
        self._metrics = metrics
        self._num_open = 0
        self.draining = False
        """Nothing new is begun."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            self._check(scope)
            self._num_open += 1
            try:
                await self._app({**scope, "app": self}, receive, send)
            finally:
                self._num_open -= 1
            return
        except ClientGone:
            return
        except ApiError as error:
            failure = error
        except HTTPException as error:  # of the router: no such path, or not this method
            failure = _of_router(error, scope)
        except Exception as error:
            log_defect(logger, error)
            failure = internal_error()
        self._metrics.note_request(NO_ROUTE, failure.status)
        await failure.response()(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._config.max_header_nbytes:
            raise ApiError("the request's header is too large", status=431)
        headers = Headers(scope=scope)
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_PREFIX)
        if self._key is None:
            self._check_host(headers)
            if scope["method"] not in SAFE_METHODS:
                self._check_origin(headers)
        elif not is_open:
            self._check_key(headers, self._key.get().get_secret_value().encode())
        if path in OPEN_PATHS:
            return
        if self.draining:
            raise ApiError(
                "this edge is about to end and takes no more requests",
                status=503,
                kind=SERVER_ERROR,
                code="shutting_down",
                headers={"Connection": "close"},
            )
        if self._num_open >= self._config.max_concurrent:
            raise too_many(
                f"this edge answers {self._num_open} requests already; try again in a moment",
                RETRY_AFTER_S,
            )

    @staticmethod
    def _check_key(headers: Headers, key: bytes) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # In constant time: how long a wrong key takes says nothing about the right one.
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode("latin-1"), key
        ):
            raise ApiError(
                "wrong API key, or none: send it as 'Authorization: Bearer KEY'; it is the one "
                "that http.api_key in this edge's settings names",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    @staticmethod
    def _check_host(headers: Headers) -> None:
        host = headers.get("host", "")
        if not is_loopback(_host_name(f"//{host}")):
            raise ApiError(
                f"this edge answers to localhost and 127.0.0.1 only, not to {host[:80]!r}; to use "
                "another name set http.api_key",
                status=403,
                code="host_not_allowed",
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:  # not a browser
            return
        allowed = {f"http://{headers.get('host', '')}", *self._config.cors_origins}
        if origin.lower() not in allowed and ANY_ORIGIN not in allowed:
            raise ApiError(
                f"pages of {origin[:80]} may not use this edge; add them to http.cors_origins in "
                "its settings",
                status=403,
                code="origin_not_allowed",
            )


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _of_router(error: HTTPException, scope: Scope) -> ApiError:
    headers: Mapping[str, str] = error.headers or {}
    path = scope["path"][:80]
    if error.status_code == 405:
        message = f"{scope['method'][:20]} is not possible on {path}; try {headers.get('Allow')}"
        return ApiError(message, status=405, code="method_not_allowed", headers=headers)
    return ApiError(f"there is nothing at {path}", status=404, code="not_found")
