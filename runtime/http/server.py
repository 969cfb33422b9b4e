"""Listening for HTTP, and ending without cutting anybody off."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from uvicorn.config import Config
from uvicorn.server import ServerState

from privatelora.errors import ConnectError
from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.host_port import parse_host_port
from privatelora.runtime.http.protocol import Protocol
from privatelora.runtime.http.routes import Api
from privatelora.runtime.http_config import HttpConfig
from privatelora.runtime.secret_config import CurrentSecret

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 60
EXTRA_CONNECTIONS = 64
"""Beside those that requests run on: clients keep some open."""
ABORT_TIMEOUT_S = 5.0


class HttpServer:
    """Answers requests to one edge while its ``listening`` context lasts.

    uvicorn serves the single connections. Its own server is not used: that one takes over the
    process' signals, ends the process where it cannot listen, and wakes ten times a second.
    """

    def __init__(self, service: EdgeService, config: HttpConfig) -> None:
        """Raises ConfigError if the API key cannot be read."""
        self._config = config
        key = None if config.api_key is None else CurrentSecret(config.api_key)
        self._api = Api(service, config, key)
        self._state = ServerState()
        self._uvicorn = Config(
            self._api,
            lifespan="off",
            ws="none",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=config.max_header_nbytes,
        )
        self._uvicorn.load()
        # It warns of every malformed request, which a client that makes them decides.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self.url = ""
        """Where it listens, once it does."""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Answer requests; cuts off who is left at the end. Raises ConnectError."""
        host, port = parse_host_port(self._config.listen)
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(lambda: self._protocol(loop), host, port)
        except OSError as error:
            raise ConnectError(
                f"cannot listen for HTTP on {self._config.listen}: {error.strerror}; set "
                "http.listen to another address"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            server.close()
            await self._cut_off()

    async def drain(self) -> None:
        """Begin nothing new and return when all that is under way is done, or in time.

        It goes on listening meanwhile: ``/health/ready`` says that nobody should come any more.
        """
        self._api.gate.draining = True
        for connection in list(self._state.connections):
            connection.shutdown()
        deadline = self._config.drain_timeout_s
        try:
            async with asyncio.timeout(deadline):
                while self._state.tasks:
                    await asyncio.wait(set(self._state.tasks))
        except TimeoutError:
            logger.warning("%d requests did not end within %g s", len(self._state.tasks), deadline)

    def _protocol(self, loop: asyncio.AbstractEventLoop) -> Protocol:
        return Protocol(
            self._uvicorn,
            self._state,
            loop,
            timeout_s=self._config.request_timeout_s,
            max_connections=self._config.max_concurrent + EXTRA_CONNECTIONS,
        )

    async def _cut_off(self) -> None:
        for connection in list(self._state.connections):
            connection.transport.abort()
        # Tasks see that their clients are gone and end; cancelling them would be logged as a fault.
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=ABORT_TIMEOUT_S)
