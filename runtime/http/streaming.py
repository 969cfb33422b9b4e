"""Server-sent events: an answer as it is made."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from privatelora.errors import PrivateLoRAError
from privatelora.runtime.http.answers import while_connected
from privatelora.runtime.http.defects import log_defect
from privatelora.runtime.http.errors import (
    ApiError,
    ClientGone,
    as_api_error,
    internal_error,
    json_bytes,
)

logger = logging.getLogger(__name__)

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Nobody between here and the client is to collect the events first."""

Events = AsyncGenerator[bytes, None]


def event(data: bytes) -> bytes:
    """One event."""
    return b"data: " + data + b"\n\n"


DONE = event(b"[DONE]")


class EventStream(Response):
    """Sends events until they end or the client is gone.

    Nothing is sent before the first event: an error up to there has a status of its own, one
    after it is an event that ends the stream.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            await while_connected(receive, self._send(scope, receive, send))
        except ClientGone:
            logger.info("a client left before its answer ended")

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": self.status_code,
                                "headers": self.raw_headers,
                            }
                        )
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except ApiError as error:
                failure = error
            except PrivateLoRAError as error:
                failure = as_api_error(error)
            except Exception as error:
                log_defect(logger, error)
                failure = internal_error()
            else:
                await send({"type": "http.response.body", "body": DONE})
                return
        if started:
            await send({"type": "http.response.body", "body": event(json_bytes(failure.body))})
        else:
            self.status_code = failure.status
            await failure.response()(scope, receive, send)
