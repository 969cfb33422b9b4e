"""The contract every transport keeps.

A connection carries *frames*: opaque byte strings with their boundaries kept, in order,
each delivered whole or not at all. Only ``ConnectError``, ``ConnectionClosed``,
``TransportTimeout``, ``RemoteProtocolError`` and ``AuthError`` come out of a transport,
``ConfigError`` for an address that can never work, and ``LocalProtocolError`` for a caller's
mistake (a frame over the limit, two concurrent receives).

Concurrency: one task may receive while others send. Frames of concurrent ``send`` calls are
never interleaved. Cancelling ``recv`` between frames loses nothing; a ``send`` that is cut
off after part of its frame was written aborts the connection, because the position in the
stream is unknown to the peer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Limits:
    """Bounds that one end puts on its connections.

    ``max_frame_nbytes``: a larger incoming frame is refused before anything is allocated
    (RemoteProtocolError, and the connection is aborted); a larger outgoing one is a
    LocalProtocolError. ``max_queued_nbytes``: received and not yet taken; beyond it the
    transport stops reading, so that a fast sender is slowed down (back-pressure). At least
    one whole frame is always accepted.
    """

    max_frame_nbytes: int = 64 * 2**20
    max_queued_nbytes: int = 64 * 2**20
    connect_timeout_s: float = 10.0
    close_timeout_s: float = 5.0


@dataclass
class ByteCounters:
    """Bytes and frames that crossed one connection, framing included."""

    sent_nbytes: int = 0
    sent_frames: int = 0
    received_nbytes: int = 0
    received_frames: int = 0


class Connection(ABC):
    """One end of an ordered, reliable, bidirectional stream of frames."""

    counters: ByteCounters
    """Traffic of this end so far."""

    @property
    @abstractmethod
    def peer(self) -> str:
        """Where the other end is, for messages to people."""

    @abstractmethod
    async def send(self, *parts: Buffer) -> None:
        """Send one frame, the concatenation of ``parts``.

        Returns once every part may be reused by the caller and no more than a bounded
        amount is queued, so waiting here is the back-pressure. Small frames are handed to
        the operating system before this returns, whatever the loop does next.
        Raises ConnectionClosed if the connection is closed or breaks.
        """

    @abstractmethod
    async def recv(self) -> memoryview:
        """Return the next frame; the caller owns the memory.

        Raises ConnectionClosed after the last frame the peer sent before closing;
        RemoteProtocolError if the peer broke the framing or a limit.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close in order: frames already sent are delivered, then the peer sees the end.

        Bounded by ``close_timeout_s``, after which it aborts. Never raises; may be repeated.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop the connection at once, losing what was not delivered. May be repeated."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc_type is None:
            await self.aclose()
        else:
            self.abort()


Handler = Callable[[Connection], Awaitable[None]]


class Listener(ABC):
    """Accepts connections and runs ``handler`` in a task of its own for each.

    When a handler returns or raises, its connection is closed or aborted; an exception is
    logged and never ends the listener.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """Contact address: what a peer passes to ``connect`` (the real port, not 0)."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop accepting, cancel the handlers and wait for them. May be repeated."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class Transport(ABC):
    """A way to move frames, chosen by the scheme of an address."""

    @abstractmethod
    async def connect(self, address: str, limits: Limits) -> Connection:
        """Open a connection. Raises ConnectError, TransportTimeout, AuthError or ConfigError."""

    @abstractmethod
    async def listen(self, address: str, handler: Handler, limits: Limits) -> Listener:
        """Start listening. Raises ConnectError (address in use, not permitted) or ConfigError."""
