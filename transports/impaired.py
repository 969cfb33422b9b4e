"""A connection that behaves as over a worse network, to rehearse a deployment and inject faults.

Each direction is an emulated link (emulated_link.py): a frame that is sent goes to the wrapped
connection once it has crossed the link, and a frame that the wrapped connection received is held
back until then. So wrapping one end impairs both directions.

What cannot be emulated from here: the wrapped connection's own time comes on top; a program that
computes without letting its event loop run hands over and takes in late, so wrap the end that
mostly waits. The links hold up to ``Link.window_nbytes`` and one frame each way besides what the
wrapped connection may hold, and the peer feels back-pressure only when both are full. Open the
wrapped connection with ``spin_s=0``: it would spin while frames of the other direction fall due.
"""

from __future__ import annotations

import asyncio
import logging
import math

from privatelora.errors import ConnectionClosed, PrivateLoRAError
from privatelora.transports.base import Buffer, Connection, Limits
from privatelora.transports.connection import QueuedConnection
from privatelora.transports.emulated_link import (
    FRAME_OVERHEAD_NBYTES,
    Impairment,
    Link,
    Passage,
)
from privatelora.transports.flow import again, wake
from privatelora.transports.framing import frame_nbytes
from privatelora.transports.precise_timer import PreciseTimer, Timer

_logger = logging.getLogger("privatelora.transports")


def impaired(
    connection: Connection, limits: Limits, *, send: Impairment, receive: Impairment, seed: int
) -> Connection:
    """Wrap ``connection``, which was opened with ``limits``, in a worse network.

    What it sends suffers ``send`` and what it receives ``receive``; with the same ``seed`` the
    same frames meet the same faults. From here on use only the connection returned: it owns the
    wrapped one. ``aclose`` delivers what was sent, as late as the network is slow, and aborts
    after ``close_timeout_s`` as ever. ``counters`` are those of the wrapped connection, which
    count a frame when it is handed over or taken in there. Needs a running event loop.
    """
    return ImpairedConnection(connection, limits, send, receive, seed, PreciseTimer())


class ImpairedConnection(QueuedConnection):
    """A connection between two emulated links; owns ``inner`` and ``timer``."""

    def __init__(
        self,
        inner: Connection,
        limits: Limits,
        send: Impairment,
        receive: Impairment,
        seed: int,
        timer: Timer,
    ) -> None:
        super().__init__(inner.peer, limits)
        self.counters = inner.counters
        self._inner = inner
        self._timer = timer
        self._outgoing = _Pipe(send, f"{seed}/send", timer)
        self._incoming = _Pipe(receive, f"{seed}/receive", timer)
        self._incoming_error: PrivateLoRAError
        """Why nothing more will come in; set before the end enters the link."""
        self._room_waiter: asyncio.Future[None] | None = None
        self._tasks = [
            self._loop.create_task(self._hand_over_all(), name=f"send to {inner.peer}"),
            self._loop.create_task(self._take_in_all(), name=f"receive from {inner.peer}"),
            self._loop.create_task(self._deliver_all(), name=f"deliver from {inner.peer}"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)

    @property
    def identity(self) -> str | None:
        """What the peer has proven to be; see Connection.identity."""
        return self._inner.identity

    @property
    def is_trusted(self) -> bool:
        """Whether the peer would be let in now; see Connection.is_trusted."""
        return self._inner.is_trusted

    # Sending

    async def send(self, *parts: Buffer) -> None:
        """Send one frame; see Connection.send.

        Returns once no more than the window is on the link. A frame that waits for room is
        withdrawn when this is cancelled; of one above the window, parts are on their way.
        """
        nbytes = frame_nbytes(parts, self._limits.max_frame_nbytes)
        self._raise_if_refused()
        pipe = self._outgoing
        async with self._turns:
            self._raise_if_broken()
            ready = self._timer.now()
            await pipe.until_holding(max(0, pipe.window_nbytes - nbytes - FRAME_OVERHEAD_NBYTES))
            self._raise_if_broken()
            passage = pipe.schedule(memoryview(bytearray().join(parts)), ready)
            if pipe.head is None and passage.arrival <= ready:
                # Not through a task, so that the bytes leave even if the loop computes next.
                await self._hand_over(passage)
            else:
                pipe.enter(passage)
                try:
                    await pipe.until_holding(pipe.window_nbytes)
                except asyncio.CancelledError:
                    self.abort()
                    raise
            self._raise_if_broken()

    async def _hand_over_all(self) -> None:
        """Bring what has crossed the outgoing link to the wrapped connection, until the end."""
        pipe = self._outgoing
        while (passage := await pipe.next_due()).frame is not None:
            await self._hand_over(passage)
            if self._broken is None:
                pipe.leave()
        await self._inner.aclose()
        self._peer_ended.set()

    async def _hand_over(self, passage: Passage) -> None:
        self._log_faults("sent to", passage)
        if passage.lost:
            self._lose("sent to", passage)
        elif passage.frame is not None:
            try:
                await self._inner.send(passage.frame)
            except PrivateLoRAError as error:
                # Only this direction: what the peer said before it left can still be received.
                self._refusal = self._broken = ConnectionClosed(*error.args)
                self._outgoing.clear()

    def _end_sending(self) -> None:
        self._outgoing.enter(self._outgoing.schedule_end(self._timer.now()))

    # Receiving

    async def _take_in_all(self) -> None:
        """Put what the wrapped connection receives on the incoming link, until its end."""
        pipe = self._incoming
        try:
            while True:
                await pipe.until_holding(pipe.window_nbytes)
                frame = await self._inner.recv()
                if self._closing:
                    await asyncio.sleep(0)  # a flood that is dropped must not hold the loop
                    continue
                ready = self._timer.now()
                passage = pipe.schedule(frame, ready)
                if pipe.head is None and passage.arrival <= ready and not self._queue.full:
                    self._deliver(passage)
                else:
                    pipe.enter(passage)
        except PrivateLoRAError as error:
            self._incoming_error = again(error)
        pipe.enter(pipe.schedule_end(self._timer.now()))

    async def _deliver_all(self) -> None:
        """Bring what has crossed the incoming link to the receiver's queue, until the end."""
        pipe = self._incoming
        while (passage := await pipe.next_due()).frame is not None:
            if self._queue.full:
                self._room_waiter = self._loop.create_future()
                await self._room_waiter
            else:
                pipe.leave()
                self._deliver(passage)
        if isinstance(self._incoming_error, ConnectionClosed):
            self._queue.end(self._incoming_error)
        else:
            self._fail(self._incoming_error)

    def _deliver(self, passage: Passage) -> None:
        self._log_faults("received from", passage)
        if passage.lost:
            self._lose("received from", passage)
        elif passage.frame is not None:
            self._queue.put(passage.frame)

    def _room_made(self) -> None:
        wake(self._room_waiter)

    def _discard_incoming(self) -> None:
        self._incoming.clear()

    # Ending

    def _lose(self, what: str, passage: Passage) -> None:
        error = ConnectionClosed(
            f"the connection was lost on purpose, at frame {passage.number} {what} {self._peer}"
        )
        self._queue.end(error)
        self._finish(error, reset=True)

    def _release(self, *, reset: bool) -> None:
        if reset:
            self._inner.abort()
        for task in self._tasks:
            task.cancel()
        self._outgoing.clear()
        self._incoming.clear()
        self._timer.close()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("a defect aborts the connection to %s", self._peer, exc_info=error)
            self.abort()

    def _log_faults(self, what: str, passage: Passage) -> None:
        if passage.faults:
            _logger.info("frame %d %s %s: %s", passage.number, what, self._peer, passage.faults)


class _Pipe(Link):
    """A link that can be waited for; by one task at its end, and one that needs room on it."""

    def __init__(self, impairment: Impairment, seed: str, timer: Timer) -> None:
        super().__init__(impairment, seed)
        self._timer = timer
        self._loop = asyncio.get_running_loop()
        self._due_waiter: asyncio.Future[None] | None = None
        self._room_waiter: asyncio.Future[None] | None = None

    def enter(self, passage: Passage) -> None:
        """Put a passage on the link; see Link.enter."""
        if self.head is None:
            wake(self._due_waiter)
        super().enter(passage)

    def leave(self) -> None:
        """Take the head off the link; see Link.leave."""
        super().leave()
        wake(self._room_waiter)

    def clear(self) -> None:
        """Forget everything on the link; see Link.clear."""
        super().clear()
        wake(self._room_waiter)

    async def next_due(self) -> Passage:
        """Wait until a passage arrives and return it, without taking it off the link."""
        while True:
            head = self.head
            if head is not None and head.arrival <= self._timer.now():
                return head
            self._due_waiter = self._loop.create_future()
            if head is not None:
                self._timer.wake_at(head.arrival, self._due_waiter)
            await self._due_waiter

    async def until_holding(self, nbytes: int) -> None:
        """Wait until no more than ``nbytes`` are on the link."""
        while True:
            now = self._timer.now()
            when = self.time_of_holding(nbytes, now)
            if when <= now:
                return
            self._room_waiter = self._loop.create_future()
            if when < math.inf:
                self._timer.wake_at(when, self._room_waiter)
            await self._room_waiter
