"""A connection over ZeroMQ messages; the same on both ends, whatever socket carries it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from privatelora.errors import ConnectionClosed, RemoteProtocolError
from privatelora.transports.base import Buffer, Limits
from privatelora.transports.connection import QueuedConnection
from privatelora.transports.flow import AdaptiveSpin, again, wake
from privatelora.transports.framing import frame_nbytes
from privatelora.transports.zeromq_protocol import (
    ABORT,
    BEGIN,
    CREDIT,
    DATA,
    END,
    END_MESSAGE,
    ENDED,
    ENDED_MESSAGE,
    PIECE,
    PIECE_NBYTES,
    Incoming,
    Outgoing,
    data_message,
    data_messages,
    wire_nbytes,
)


class Link(ABC):
    """The way from one end of a connection to the other."""

    @abstractmethod
    def post(self, message: bytes) -> bool:
        """Hand a message to ZeroMQ, which never has to wait; False if the peer is gone."""

    @abstractmethod
    def receive(self) -> None:
        """Hand what has arrived to the connections it is for."""

    @abstractmethod
    def release(self, *, reset: bool) -> None:
        """The connection needs this no more. ``reset``: let the peer notice."""


class ZmqConnection(QueuedConnection):
    """One end of an open connection.

    ``window_nbytes``: the peer's. The counters include ZeroMQ's framing of the messages with
    frames, and leave out the short messages that only control the flow and the end.
    """

    def __init__(
        self, peer: str, limits: Limits, link: Link, window_nbytes: int, identity: str | None
    ) -> None:
        super().__init__(peer, limits)
        self._link = link
        self._identity = identity
        self._outgoing = Outgoing(peer, window_nbytes)
        self._incoming = Incoming(peer, limits)
        self._spin = AdaptiveSpin(limits.spin_s) if limits.spin_s else None
        self._credit_waiter: asyncio.Future[None] | None = None
        self._discarding = False
        self._end_sent = self._end_arrived = self._end_received = False

    @property
    def identity(self) -> str | None:
        """The key that the peer has proven to own; see Connection.identity."""
        return self._identity

    async def send(self, *parts: Buffer) -> None:
        """Send one frame; see Connection.send."""
        nbytes = frame_nbytes(parts, self._limits.max_frame_nbytes)
        self._raise_if_refused()
        if nbytes <= PIECE_NBYTES and not self._turns.num_tasks and self._outgoing.may_start():
            self._outgoing.start(nbytes)
            self._post_data(data_message(parts))
        else:
            await self._send_in_turn(parts, nbytes)
        self.counters.sent_frames += 1

    async def _send_in_turn(self, parts: tuple[Buffer, ...], nbytes: int) -> None:
        in_frame = False
        try:
            async with self._turns:
                await self._until(self._outgoing.may_start)
                self._outgoing.start(nbytes)
                for message in data_messages(parts, nbytes):
                    await self._until(self._outgoing.may_go_on)
                    self._post_data(message)
                    in_frame = True
        except asyncio.CancelledError:
            if in_frame:
                self.abort()
            raise

    async def _until(self, allowed: Callable[[], bool]) -> None:
        self._raise_if_broken()
        while not allowed():
            self._credit_waiter = self._loop.create_future()
            await self._credit_waiter
            self._raise_if_broken()

    def _post_data(self, message: bytes) -> None:
        if not self._link.post(message):
            # Only this direction: what the peer said before it left can still be received.
            closed = ConnectionClosed(f"the connection to {self._peer} was lost")
            self._refusal = self._broken = closed
            raise again(closed)
        self._outgoing.send(len(message))
        self.counters.sent_nbytes += self._wire_nbytes(message)

    async def recv(self) -> memoryview:
        """Return the next frame; see Connection.recv."""
        queue = self._queue
        queue.require_no_receiver()
        if not self._has_input() and self._spin is not None:
            self._spin.until(self._has_input)
        return self._taken(queue.pop() if queue.frames else await queue.get())

    def recv_nowait(self) -> memoryview | None:
        """Return the next frame if it is there; see Connection.recv_nowait."""
        frame = super().recv_nowait()
        return None if frame is None else self._taken(frame)

    def _has_input(self) -> bool:
        """Look into the socket for a frame or the end."""
        if not super()._has_input():
            self._link.receive()
        return super()._has_input()

    def _taken(self, frame: memoryview) -> memoryview:
        self._incoming.take(len(frame))
        self._give_credit()
        return frame

    def on_message(self, message: memoryview) -> None:
        """Take in one message of the peer. Late ones, after the end, are ignored."""
        if self._released:
            return
        try:
            self._handle(message)
        except RemoteProtocolError as error:
            self._fail(error)

    def lost(self, reason: str) -> None:
        """The peer is gone and all its messages were taken in."""
        closed = ConnectionClosed(f"the connection to {self._peer} {reason}")
        self._queue.end(closed)
        self._finish(closed, reset=False)

    def violated(self, what: str) -> None:
        """The peer sent what no connection may."""
        self._fail(self._illegal(what))

    def _handle(self, message: memoryview) -> None:
        kind = message[0] if message else None
        if kind in (DATA, BEGIN, PIECE):
            if self._end_received:
                raise self._illegal("a frame after its end")
            self._on_data(message)
        elif kind == CREDIT:
            self._outgoing.credit(message)
            wake(self._credit_waiter)
        elif kind == END and len(message) == 1 and not self._end_received:
            if self._incoming.in_frame:
                raise self._illegal("its end inside a frame")
            self._end_received = True
            self._queue.end(ConnectionClosed(f"{self._peer} closed the connection"))
            self._link.post(ENDED_MESSAGE)
            self._note_end()
        elif kind == ENDED and len(message) == 1 and self._end_sent and not self._end_arrived:
            self._end_arrived = True
            self._note_end()
        elif kind == ABORT:
            self.lost("was aborted by the peer")
        else:
            raise self._illegal(f"{bytes(message[:16])!r} inside a connection")

    def _on_data(self, message: memoryview) -> None:
        frame = self._incoming.add(message)
        self.counters.received_nbytes += self._wire_nbytes(message)
        if frame is not None:
            self.counters.received_frames += 1
            if self._discarding:
                self._incoming.take(len(frame))
            else:
                self._queue.put(frame)
        self._give_credit()

    def _give_credit(self) -> None:
        if self._incoming.credit_due() and not self._released:
            self._link.post(self._incoming.credit())

    def _note_end(self) -> None:
        # Not before everything has arrived, because what ZeroMQ still holds is dropped then.
        if self._end_received and self._end_arrived:
            self._peer_ended.set()

    def _room_made(self) -> None:
        """Nothing: the peer gets credit for every frame that is taken."""

    def _discard_incoming(self) -> None:
        self._discarding = True
        self._incoming.take_all()
        self._give_credit()

    def _end_sending(self) -> None:
        self._end_sent = True
        self._link.post(END_MESSAGE)

    def _release(self, *, reset: bool) -> None:
        self._link.release(reset=reset)
        wake(self._credit_waiter)

    def _wire_nbytes(self, message: bytes | memoryview) -> int:
        return wire_nbytes(len(message), curve=self._identity is not None)

    def _illegal(self, what: str) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"{self._peer} sent {what}; check that both ends are PrivateLoRA of the same version"
        )
