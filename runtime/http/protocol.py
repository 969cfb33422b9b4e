"""The server's end of one HTTP connection: uvicorn's, with deadlines and errors in JSON."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from privatelora.runtime.http.errors import ApiError, json_bytes, too_many

BEFORE_RESPONSE = (h11.IDLE, h11.SEND_RESPONSE)
TOO_MANY_RETRY_AFTER_S = 5.0

MESSAGES = {
    408: "the request did not arrive in time",
    431: "the request's header is too large",
    501: "this transfer encoding is not supported",
}
"""By status; for others the request was malformed."""


class Protocol(H11Protocol):
    """Closes connections whose clients are too slow, and says what is wrong with a request.

    A request has to arrive as a whole within ``timeout_s``, and a client has to take what it is
    sent within it: else few connections could hold up everything there is.
    """

    def __init__(
        self,
        config: Config,
        state: ServerState,
        loop: asyncio.AbstractEventLoop,
        *,
        timeout_s: float,
        max_connections: int,
    ) -> None:
        super().__init__(config, state, {}, loop)
        self._timeout_s = timeout_s
        self._max_connections = max_connections
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self._refuse(too_many("this edge has too many connections", TOO_MANY_RETRY_AFTER_S))
            return
        self._receiving = self.loop.call_later(self._timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._end_receiving()
        self._end_sending()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """A response was sent; the next request may be here already."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        if self._sending is None:
            self._sending = self.loop.call_later(self._timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._end_sending()

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 refused; called while its exception is handled."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(ApiError(MESSAGES.get(status, "this is not valid HTTP"), status=status))

    def _watch(self) -> None:
        """Run the clock while a request is on its way, and only then."""
        state = self.conn.their_state
        on_its_way = state is h11.SEND_BODY or (
            state is h11.IDLE and len(self.conn.trailing_data[0]) > 0
        )
        if not on_its_way:
            self._end_receiving()
        elif self._receiving is None:
            self._receiving = self.loop.call_later(self._timeout_s, self._too_slow)

    def _too_slow(self) -> None:
        self._receiving = None
        begun = self.conn.their_state is not h11.IDLE or len(self.conn.trailing_data[0]) > 0
        if begun:
            self._refuse(ApiError(MESSAGES[408], status=408, code="request_timeout"))
        else:  # browsers open connections that they then do not use
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer instead of the application, if nobody has answered yet, and close."""
        if self.conn.our_state in BEFORE_RESPONSE:
            body = json_bytes(error.body)
            headers: list[Any] = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
                *error.headers.items(),
            ]
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _end_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _end_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
