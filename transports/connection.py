"""What connections have in common: a queue of received frames, senders in turn, closing."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable

from privatelora.errors import ConnectionClosed, PrivateLoRAError
from privatelora.transports.base import ByteCounters, Connection, Limits
from privatelora.transports.flow import FrameQueue, Turns, again


class QueuedConnection(Connection):
    """A connection that receives through a FrameQueue and closes in order.

    A transport fills ``_queue``, writes frames in ``send`` (checking ``_refusal`` before and
    ``_broken`` after every wait, taking ``_turns`` where it waits), sets ``_peer_ended`` when
    the peer will send no more, and implements the four hooks below.
    """

    def __init__(self, peer: str, limits: Limits) -> None:
        self.counters = ByteCounters()
        self._peer = peer
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._queue = FrameQueue(limits.max_queued_nbytes, self._room_made)
        self._turns = Turns()
        self._refusal: ConnectionClosed | None = None
        """Why no further send may start."""
        self._broken: ConnectionClosed | None = None
        """Why a send under way cannot go on."""
        self._peer_ended = asyncio.Event()
        self._closing = False
        self._released = False
        self.ask_trust: Callable[[], bool] | None = None
        """See ``is_trusted``; set by a listener that trusts some and not others."""

    @abstractmethod
    def _room_made(self) -> None:
        """The receive queue was full and has room again: go on filling it."""

    @abstractmethod
    def _discard_incoming(self) -> None:
        """From now on take in what the peer sends and drop it, until it ends."""

    @abstractmethod
    def _end_sending(self) -> None:
        """Let the peer see the end after all frames sent."""

    @abstractmethod
    def _release(self, *, reset: bool) -> None:
        """Free what the operating system lent and wake a send that waits.

        ``reset``: drop undelivered data and let the peer notice.
        """

    @property
    def is_trusted(self) -> bool:
        """Whether the peer would be let in now; see Connection.is_trusted."""
        return self.ask_trust is None or self.ask_trust()

    @property
    def peer(self) -> str:
        """Where the other end is, for messages to people."""
        return self._peer

    async def recv(self) -> memoryview:
        """Return the next frame; see Connection.recv."""
        return await self._queue.get()

    def recv_nowait(self) -> memoryview | None:
        """Return the next frame if it is there; see Connection.recv_nowait."""
        self._queue.require_no_receiver()
        return self._queue.pop() if self._has_input() and self._queue.frames else None

    def _has_input(self) -> bool:
        """Whether a frame or the end is there to be taken.

        A transport that can looks for what has arrived first.
        """
        return bool(self._queue.frames) or self._queue.error is not None

    async def aclose(self) -> None:
        """Close in order; see Connection.aclose."""
        if self._released:
            return
        if not self._closing:
            self._closing = True
            closed = ConnectionClosed(f"the connection to {self._peer} was closed by this end")
            self._refusal = self._refusal or closed
            self._queue.drop(closed)
            self._discard_incoming()
        try:
            async with asyncio.timeout(self._limits.close_timeout_s):
                async with self._turns:
                    self._end_sending()
                await self._peer_ended.wait()
        except TimeoutError:
            self.abort()
        except BaseException:
            self.abort()
            raise
        self._finish(None, reset=False)

    def abort(self) -> None:
        """Drop the connection at once; see Connection.abort."""
        if self._released:
            return
        error = ConnectionClosed(f"the connection to {self._peer} was aborted by this end")
        self._queue.drop(error)
        self._finish(error, reset=True)

    def _fail(self, error: PrivateLoRAError) -> None:
        """The peer broke the rules: reset; the receiver gets ``error`` after what is queued."""
        self._queue.end(error)
        self._finish(ConnectionClosed(f"the connection was aborted: {error}"), reset=True)

    def _finish(self, error: ConnectionClosed | None, *, reset: bool) -> None:
        if self._released:
            return
        self._released = True
        self._broken = self._broken or error
        self._refusal = self._refusal or error
        self._peer_ended.set()
        self._release(reset=reset)

    def _raise_if_refused(self) -> None:
        if self._refusal is not None:
            raise again(self._refusal)

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise again(self._broken)
