"""Which path is answered by what."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from privatelora import __version__
from privatelora.errors import PrivateLoRAError, UnknownModel
from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.http import page_files
from privatelora.runtime.http.answers import while_connected
from privatelora.runtime.http.bodies import read_request
from privatelora.runtime.http.chat import ChatCompletion
from privatelora.runtime.http.completions import Completion
from privatelora.runtime.http.defects import log_defect
from privatelora.runtime.http.errors import (
    ApiError,
    ClientGone,
    as_api_error,
    internal_error,
    json_response,
)
from privatelora.runtime.http.gate import Gate
from privatelora.runtime.http.metrics import EdgeMetrics
from privatelora.runtime.http.schemas import ChatRequest, CompletionRequest
from privatelora.runtime.http.streaming import EventStream
from privatelora.runtime.http_config import HttpConfig
from privatelora.runtime.secret_config import CurrentSecret

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """All routes of one edge, as an ASGI application."""

    def __init__(
        self, service: EdgeService, config: HttpConfig, api_key: CurrentSecret | None = None
    ) -> None:
        self._service = service
        self._config = config
        self._metrics = EdgeMetrics()
        routes = [
            self._route("/", "GET", page_files.index),
            self._route("/page/{name}", "GET", page_files.file),
            self._route("/health/live", "GET", self._live),
            self._route("/health/ready", "GET", self._ready),
            self._route("/metrics", "GET", self._prometheus),
            self._route("/v1/models", "GET", self._models),
            self._route("/v1/models/{name:path}", "GET", self._model),
            self._route("/v1/chat/completions", "POST", self._chat),
            self._route("/v1/completions", "POST", self._completion),
            self._route("/v1/privatelora/status", "GET", self._status),
            self._route("/v1/privatelora/sent", "GET", self._sent),
        ]
        router = Router(routes, redirect_slashes=False)
        self.gate = Gate(router, config, api_key, self._metrics)
        self._app: ASGIApp = self.gate
        if config.cors_origins:
            self._app = CORSMiddleware(
                self.gate,
                allow_origins=config.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._app(scope, receive, send)

    def _route(self, path: str, method: str, handler: Handler) -> Route:
        return Route(path, _Endpoint(path, handler, self._metrics), methods=[method])

    async def _live(self, request: Request) -> Response:
        return json_response({"status": "live"})

    async def _ready(self, request: Request) -> Response:
        reason: str | None = "this edge is about to end"
        if not self.gate.draining:
            reason = (await self._service.status()).problem
        if reason is not None:
            return json_response({"status": "not ready", "reason": reason}, 503)
        return json_response({"status": "ready"})

    async def _prometheus(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        models = [self._described(name) for name in self._service.models]
        return json_response({"object": "list", "data": models})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._service.models:
            known = ", ".join(self._service.models)
            raise UnknownModel(f"there is no model {name[:80]!r} here; choose from {known}")
        return json_response(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(self._service.started_at),
            "owned_by": "privatelora",
            "max_model_len": self._service.max_positions,
        }

    async def _chat(self, request: Request) -> Response:
        body = await read_request(request, ChatRequest, self._config.max_body_nbytes)
        completion = ChatCompletion(self._service, self._metrics, body)
        if body.stream:
            return EventStream(completion.events())
        return json_response(await while_connected(request.receive, completion.whole()))

    async def _completion(self, request: Request) -> Response:
        body = await read_request(request, CompletionRequest, self._config.max_body_nbytes)
        completion = Completion(self._service, self._metrics, body)
        if body.stream:
            return EventStream(completion.events())
        return json_response(await while_connected(request.receive, completion.whole()))

    async def _status(self, request: Request) -> Response:
        status = dataclasses.asdict(await self._service.status())
        return json_response({**status, "version": __version__})

    async def _sent(self, request: Request) -> Response:
        text = request.query_params.get("after", "-1")
        if len(text) > 15 or not text.removeprefix("-").isdecimal():
            raise ApiError("after: should be a number", param="after", code="invalid_value")
        sent = self._service.sent
        recent = [dataclasses.asdict(message) for message in sent.recent(int(text))]
        for message in recent:  # JSON has neither infinities nor NaN
            message["numbers"] = [x if math.isfinite(x) else None for x in message["numbers"]]
        totals = {
            kind: {"messages": messages, "nbytes": nbytes}
            for kind, (messages, nbytes) in sent.totals.items()
        }
        return json_response({"totals": totals, "recent": recent})


class _Endpoint:
    """One handler as an ASGI application that always answers in OpenAI's shape."""

    def __init__(self, route: str, handler: Handler, metrics: EdgeMetrics) -> None:
        self._route = route
        self._handler = handler
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._handler(Request(scope, receive, send))
        except ClientGone:
            logger.info("a client left before its answer ended")
            return
        except ApiError as error:
            response = error.response()
        except PrivateLoRAError as error:
            response = as_api_error(error).response()
        except Exception as error:
            log_defect(logger, error)
            response = internal_error().response()
        await response(scope, receive, send)
        self._metrics.note_request(self._route, response.status_code)
