"""Sending from code that may not wait."""

from __future__ import annotations

import asyncio
import logging
import types
from collections import deque
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any

from privatelora.errors import TransportError
from privatelora.transports.base import Buffer, Connection

logger = logging.getLogger(__name__)


class Outbox:
    """Posts frames on a connection, in order, from code that has other connections to serve.

    A frame that the transport takes at once has left when ``post`` returns. Else the rest goes
    out in a task, and later frames wait behind it. How much may wait is for the caller to bound.
    Nothing else may send on the connection. A connection that breaks drops everything: whoever
    receives on it learns of that.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[tuple[Buffer, ...]] = deque()
        self._sender: asyncio.Task[None] | None = None

    def post(self, parts: tuple[Buffer, ...]) -> None:
        """Send one frame, the concatenation of ``parts``, which must not change any more."""
        if self._sender is not None:
            self._waiting.append(parts)
            return
        sending = self._connection.send(*parts)
        try:
            # A coroutine that does not have to wait ends here, without a task and its detour.
            waits_for = sending.send(None)
        except StopIteration:
            return
        except TransportError as error:
            self._drop(error)
            return
        self._sender = asyncio.create_task(self._send_rest(sending, waits_for))
        self._sender.add_done_callback(partial(self._sent, sending))

    @property
    def num_waiting(self) -> int:
        """Frames that wait behind one that the transport is sending."""
        return len(self._waiting)

    async def aclose(self) -> None:
        """Wait until everything was sent, or the connection broke."""
        if self._sender is not None:
            await asyncio.wait({self._sender})

    def abort(self) -> None:
        """Send nothing more."""
        self._waiting.clear()
        if self._sender is not None:
            self._sender.cancel()

    async def _send_rest(self, sending: Coroutine[Any, Any, None], waits_for: Any) -> None:
        try:
            await _resume(sending, waits_for)
            while self._waiting:
                await self._connection.send(*self._waiting.popleft())
        except TransportError as error:
            self._drop(error)
        finally:
            self._sender = None

    def _sent(self, sending: Coroutine[Any, Any, None], sender: asyncio.Task[None]) -> None:
        """A task that was cancelled before it began has not closed what it was to go on with."""
        sending.close()
        if self._sender is sender:
            self._sender = None

    def _drop(self, error: TransportError) -> None:
        self._waiting.clear()
        logger.info("%s: could not be sent to: %s", self._connection.peer, error)


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """Go on with a coroutine that was started by hand and has to wait for ``waits_for``."""
    while True:
        try:
            try:
                got = yield waits_for
            except BaseException as error:
                waits_for = coroutine.throw(error)
            else:
                waits_for = coroutine.send(got)
        except StopIteration:
            return
