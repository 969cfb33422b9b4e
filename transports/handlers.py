"""Runs a listener's handler in one task per connection."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from privatelora.errors import ConnectionClosed, PrivateLoRAError
from privatelora.transports.base import Connection, Handler
from privatelora.transports.brief_log import BriefLog

_logger = logging.getLogger("privatelora.transports")

MAX_CLOSING = 64
"""Connections at one listener that wait for their peer to close too. One more ends the longest
wait: a peer that does not close would keep descriptors for ``close_timeout_s``."""


class HandlerTasks:
    """The handlers that are running for one listener.

    ``where``: the listener's address, for the log.
    """

    def __init__(self, handler: Handler, where: str) -> None:
        self._handler = handler
        self._where = where
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: dict[Connection, None] = {}
        """Longest first."""
        self._log = BriefLog(_logger)

    def start(self, connection: Connection) -> None:
        """Run the handler on ``connection`` and close it afterwards."""
        task = asyncio.get_running_loop().create_task(
            self._run(connection), name=f"handler of {connection.peer} at {self._where}"
        )
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, connection))

    async def aclose(self) -> None:
        """Cancel all handlers and wait until they have ended."""
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, connection: Connection) -> None:
        try:
            await self._handler(connection)
        except ConnectionClosed as error:
            _logger.info("%s: a connection ended: %s", self._where, error)
        except PrivateLoRAError as error:
            self._log.warning("%s: dropped %s: %s", self._where, connection.peer, error)
        except Exception:
            _logger.exception("%s: the handler of %s failed", self._where, connection.peer)
        else:
            await self._close(connection)

    async def _close(self, connection: Connection) -> None:
        if len(self._closing) >= MAX_CLOSING:
            longest = next(iter(self._closing))
            del self._closing[longest]
            longest.abort()
        self._closing[connection] = None
        await connection.aclose()

    def _done(self, connection: Connection, task: asyncio.Task[None]) -> None:
        # Here and not in _run, because a task cancelled before its first step never runs.
        connection.abort()
        self._tasks.discard(task)
        self._closing.pop(connection, None)
