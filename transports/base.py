"""The contract every transport keeps.

A connection carries *frames*: opaque byte strings with their boundaries kept, in order,
each delivered whole or not at all. Only ``ConnectError``, ``ConnectionClosed``,
``TransportTimeout``, ``RemoteProtocolError`` and ``AuthError`` come out of a transport,
``ConfigError`` for an address that can never work, and ``LocalProtocolError`` for a caller's
mistake (a frame over the limit, two concurrent receives).

Concurrency: one task may receive while others send. Frames of concurrent ``send`` calls are
never interleaved, and those that have to wait go out in the order of the calls. Cancelling
``recv`` loses nothing; a ``send`` that is cut off after part of its frame was written aborts
the connection, because the position in the stream is unknown to the peer.

Ending: each direction ends on its own. When the peer closes, ``recv`` raises ConnectionClosed
after its last frame, and ``send`` still works until the peer has gone altogether: ``aclose``
ends sending at once, then takes in and drops what the peer still sends until the peer closes
too. So the end that learns of the close from ``recv`` should close soon. ``abort`` ends both
directions at once; what the peer's system had already received may still reach the peer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from privatelora.errors import ConfigError

Buffer = bytes | bytearray | memoryview

MAX_FRAME_NBYTES = 2**32 - 1
"""What a frame header can say; the highest value of ``Limits.max_frame_nbytes``."""


@dataclass(frozen=True)
class Limits:
    """Bounds that one end puts on its connections.

    ``max_frame_nbytes``: a larger incoming frame is refused before anything is allocated
    (RemoteProtocolError, and the connection is aborted); a larger outgoing one is a
    LocalProtocolError. ``max_queued_nbytes``: received and not yet taken; beyond it the
    transport stops reading, so that a fast sender is slowed down (back-pressure). At least
    one whole frame is always accepted, and a transport may count some overhead per frame.
    ``spin_s``: how long ``recv`` may look for a frame without letting the event loop sleep (or
    do anything else), where the transport can; 0 is never, None the transport's own choice.
    While the peer mostly takes longer, it is done rarely. ``close_timeout_s``: how long
    ``aclose`` waits for the peer before it aborts.

    Raises ConfigError for a value that cannot work.
    """

    max_frame_nbytes: int = 64 * 2**20
    max_queued_nbytes: int = 64 * 2**20
    spin_s: float | None = None
    connect_timeout_s: float = 10.0
    close_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None or value > 0 or (name, value) == ("spin_s", 0):
                continue
            raise ConfigError(f"{name} must be positive, not {value}")
        if self.max_frame_nbytes > MAX_FRAME_NBYTES:
            raise ConfigError(
                f"max_frame_nbytes must be at most {MAX_FRAME_NBYTES}, not {self.max_frame_nbytes}"
            )


@dataclass(frozen=True)
class TlsCredentials:
    """Files (PEM) for ``tls://``.

    ``certificate`` (with its chain) and ``private_key``: what this end proves itself with; a
    listener needs them, a client where the cloud asks for them. ``trust``: a file or a folder of
    ``*.crt`` and ``*.pem`` files with the certificates, of peers or of authorities, that a peer
    is checked against. Without it a client trusts the system's authorities, and a listener asks
    for no certificate.
    """

    certificate: Path | None = None
    private_key: Path | None = None
    trust: Path | None = None


@dataclass(frozen=True)
class CurveCredentials:
    """Files for CURVE on ZeroMQ.

    ``secret_key``: this end's. ``trust``: for a client the listener's public key file; for a
    listener a public key file or a folder of them (``*.pub``), of the clients it lets in.
    """

    secret_key: Path
    trust: Path


@dataclass(frozen=True)
class Credentials:
    """What this end proves itself with and whom it trusts, by the mechanisms there are."""

    tls: TlsCredentials | None = None
    curve: CurveCredentials | None = None

    def require_only(self, address: str, *used: str) -> None:
        """Refuse what the transport of ``address`` would silently not use; ConfigError."""
        for name, where in (("tls", "tls://"), ("curve", "zmq+tcp:// and zmq+ipc://")):
            if getattr(self, name) is not None and name not in used:
                raise ConfigError(
                    f"{address} does not use the {name} keys that are set; use {where} or "
                    f"remove the {name} settings"
                )


NO_CREDENTIALS = Credentials()


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

    @property
    def identity(self) -> str | None:
        """What the peer has proven to be, or None.

        ``tls:`` and the SHA-256 of its certificate, or ``curve:`` and its public key.
        """
        return None

    @property
    def is_trusted(self) -> bool:
        """Whether a listener would let the peer in with what it trusts now.

        It lets nobody out on its own: who is in stays until somebody asks. Always true of a
        connection that lets in everybody, and at the end that connected.
        """
        return True

    @abstractmethod
    async def send(self, *parts: Buffer) -> None:
        """Send one frame, the concatenation of ``parts``.

        Returns once every part may be reused by the caller and no more than a bounded
        amount is queued, so waiting here is the back-pressure. Small frames are handed to
        the operating system before this returns, whatever the loop does next.
        Raises ConnectionClosed if the connection is closed or breaks, LocalProtocolError if
        the frame is over this end's limit or a part is a strided memoryview.
        """

    @abstractmethod
    async def recv(self) -> memoryview:
        """Return the next frame; the caller owns the memory.

        Does not suspend if a frame is there already. Raises ConnectionClosed after the last
        frame the peer sent before closing, and at once when this end has closed or aborted;
        RemoteProtocolError if the peer broke the framing or a limit; LocalProtocolError if
        another task is waiting here.
        """

    def recv_nowait(self) -> memoryview | None:
        """Return the next frame if it is there already, None if not or if no more will come.

        Looks as far as ``recv`` does before it waits. The end is for ``recv`` to tell: after
        the last frame that raises. LocalProtocolError if another task is waiting in ``recv``.
        A connection that cannot look without waiting may always return None.
        """
        return None

    @abstractmethod
    async def aclose(self) -> None:
        """Close in order: frames already sent are delivered, then the peer sees the end.

        A waiting ``recv`` of this end raises ConnectionClosed; frames not yet taken are lost.
        Waits until the peer has closed too, at most ``close_timeout_s``, then aborts. Never
        raises, except when it is cancelled, which aborts; may be repeated.
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

    When a handler returns, its connection is closed; when it raises or is cancelled, its
    connection is aborted. An exception is logged and never ends the listener.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """Contact address: what a peer passes to ``connect`` (the real port, not 0).

        For a wildcard, the address that works on this machine; elsewhere, name this machine.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Stop accepting, cancel the handlers and wait for them. May be repeated.

        A handler that calls this is itself neither cancelled nor waited for.
        """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class Transport(ABC):
    """A way to move frames, chosen by the scheme of an address."""

    @abstractmethod
    async def connect(self, address: str, limits: Limits, credentials: Credentials) -> Connection:
        """Open a connection. Raises ConnectError, TransportTimeout, AuthError or ConfigError."""

    @abstractmethod
    async def listen(
        self, address: str, handler: Handler, limits: Limits, credentials: Credentials
    ) -> Listener:
        """Start listening. Raises ConnectError (address in use, not permitted) or ConfigError."""
