"""The edge's end of one connection to the cloud, shared by all its sequences.

One reader task takes every frame. It answers exchanges itself, without waking the sequence
they belong to: an answer is due at once, and a sequence has nothing to decide until its step
ends. Requests that are there together are answered together, and before steps that ended are
handed over: what sequences do then takes longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from pydantic import SecretStr

from privatelora import __version__
from privatelora.errors import (
    ConfigError,
    ConnectionClosed,
    PrivateLoRAError,
    ProtocolError,
    RemoteProtocolError,
    TransportError,
    TransportTimeout,
)
from privatelora.runtime.codecs import CodecPreferences, Codecs, choose_codecs
from privatelora.runtime.exchange import StepExchanges
from privatelora.runtime.link_config import ImpairedConfig
from privatelora.runtime.link_session import Ending, LinkSession, LinkStep
from privatelora.runtime.outbox import Outbox
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.sent_log import SentLog
from privatelora.runtime.wire.failures import error_reply, exception_from
from privatelora.runtime.wire.handshake import check_hello
from privatelora.runtime.wire.messages import (
    CloseSession,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    Fingerprints,
    Hello,
    Message,
    OpenSession,
    Ping,
    Pong,
    Role,
    SessionOpened,
    StepEnd,
    TensorPayload,
)
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.runtime.wire.state import WireConnection
from privatelora.transports.base import NO_CREDENTIALS, Connection, Credentials, Limits
from privatelora.transports.flow import again, wake
from privatelora.transports.impaired import impaired
from privatelora.transports.registry import connect

logger = logging.getLogger(__name__)

MAX_FRAMES_AT_ONCE = 32
MAX_ROWS_AT_ONCE = 512
"""Bounds on what is taken before it is answered. More together would hardly be faster, and the
first would wait for the last: some milliseconds at most this way."""

Answers = Callable[
    [int, Seq[tuple[StepExchanges, TensorPayload]]], list[TensorPayload | ConfigError]
]
"""From an exchange point's index and z of some steps to y, or what is wrong with that; raises
RemoteProtocolError for an impossible z."""


@dataclass(frozen=True)
class LinkSettings:
    """How an edge reaches its cloud. Times in seconds.

    ``token`` is asked for with each connection: another may have taken its place.
    """

    address: str
    codecs: CodecPreferences
    credentials: Credentials = NO_CREDENTIALS
    impaired: ImpairedConfig | None = None
    connect_timeout_s: float = 10.0
    step_timeout_s: float = 120.0
    keepalive_s: float = 15.0
    max_frame_nbytes: int = 64 * 2**20
    spin_s: float | None = None
    token: Callable[[], SecretStr] | None = None


async def open_link(
    settings: LinkSettings, fingerprints: Fingerprints, answers: Answers, sent: SentLog
) -> CloudLink:
    """Connect and greet; ``answers`` answers the exchanges of all sessions.

    ``sent`` notes what is sent. Raises as ``greet``.
    """
    connection, wire, cloud, codecs = await greet(settings, fingerprints)
    return CloudLink(connection, wire, settings, cloud, codecs, answers, sent)


async def greet(
    settings: LinkSettings, fingerprints: Fingerprints
) -> tuple[Connection, WireConnection, Hello, Codecs]:
    """Connect, say Hello and hear the cloud's; what was agreed on.

    Raises ConnectError or TransportTimeout if the cloud is not there, PartitionError if it
    serves another model, plan or basis, VersionMismatch if it speaks another protocol,
    AuthError if one end refuses the other, ConfigError if no payload codec suits both.
    """
    limits = Limits(
        max_frame_nbytes=settings.max_frame_nbytes,
        connect_timeout_s=settings.connect_timeout_s,
        spin_s=settings.spin_s if settings.impaired is None else 0.0,
    )
    connection = await connect(settings.address, limits, settings.credentials)
    if (worse := settings.impaired) is not None:
        logger.warning("the link to %s is impaired, as the settings say", settings.address)
        up, down = worse.up.impairment(), worse.down.impairment()
        connection = impaired(connection, limits, send=up, receive=down, seed=worse.seed)
    try:
        wire = WireConnection(Role.EDGE, WireLimits())
        ours = Hello(
            role=Role.EDGE,
            software=f"privatelora/{__version__}",
            fingerprints=fingerprints,
            codecs=CODEC_NAMES,
            max_frame_nbytes=settings.max_frame_nbytes,
            token=None if settings.token is None else settings.token().get_secret_value(),
        )
        await connection.send(*wire.send(ours))
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                theirs = wire.receive(await connection.recv())
        except TimeoutError as error:
            raise TransportTimeout(
                f"{settings.address} accepted the connection and said nothing for "
                f"{settings.connect_timeout_s:g} s; is it a PrivateLoRA cloud?"
            ) from error
        except ConnectionClosed as error:
            raise ConnectionClosed(
                f"{error} without a greeting; is it a PrivateLoRA cloud? Its log may say more"
            ) from error
        if isinstance(theirs, ErrorReply):
            raise exception_from(theirs)
        if not isinstance(theirs, Hello):
            raise RemoteProtocolError("the cloud's first message must be Hello")
        check_hello(ours, theirs)
        codecs = choose_codecs(settings.codecs, theirs.codecs)
    except BaseException:
        connection.abort()
        raise
    return connection, wire, theirs, codecs


_Asked = tuple[ExchangeRequest, LinkSession, LinkStep]


class CloudLink:
    """An open, greeted connection. Made by ``open_link``."""

    def __init__(
        self,
        connection: Connection,
        wire: WireConnection,
        settings: LinkSettings,
        cloud: Hello,
        codecs: Codecs,
        answers: Answers,
        sent: SentLog,
    ) -> None:
        self.cloud = cloud
        """What the cloud said of itself and offers."""
        self.codecs = codecs
        """What was agreed with it."""
        self._connection = connection
        self._wire = wire
        self._settings = settings
        self._answers = answers
        self._sent = sent
        self._outbox = Outbox(connection)
        self._pinging = asyncio.Lock()
        self._num_pings = 0
        self._answered: asyncio.Future[None] | None = None
        """To the last ping."""
        self._sessions: dict[int, LinkSession] = {}
        self._last_session_id = -1
        self._failure: PrivateLoRAError | None = None
        self._tasks = (
            asyncio.create_task(self._read(), name="privatelora-link-reader"),
            asyncio.create_task(self._keep_alive(), name="privatelora-link-keepalive"),
        )

    @property
    def num_sessions(self) -> int:
        """Those that are open on it now."""
        return len(self._sessions)

    @property
    def is_open(self) -> bool:
        """Whether sequences can still be opened and stepped on this link."""
        return self._failure is None

    async def open_session(self, max_positions: int, resume: str | None = None) -> LinkSession:
        """Make a session, one that goes on with the cache of the ``resume`` token if it can."""
        self._last_session_id += 1
        session = LinkSession(self, self._last_session_id)
        self._sessions[session.session_id] = session
        down = self.codecs.hidden_states_down, self.codecs.exchange_down
        try:
            await session.open(OpenSession(session.session_id, max_positions, *down, resume))
        except BaseException:
            self.close_session(session)
            raise
        return session

    def close_session(self, session: LinkSession) -> None:
        """Free a session; steps in flight are dropped. May be repeated, never raises."""
        if self._sessions.pop(session.session_id, None) is None:
            return
        session.fail(ConnectionClosed("the sequence was closed"))
        self._end_on_cloud(session.session_id)

    def _end_on_cloud(self, session_id: int) -> None:
        if self.is_open and session_id in self._wire.sessions:
            self.send(CloseSession(session_id))

    async def aclose(self) -> None:
        """Close the connection and everything on it. May be repeated."""
        for session_id in self._sessions:  # so that the cloud keeps nothing for this edge's return
            self._end_on_cloud(session_id)
        self._fail(ConnectionClosed("the link to the cloud was closed"))
        for task in self._tasks:
            task.cancel()
        self._outbox.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.aclose()

    @contextlib.asynccontextmanager
    async def deadline(self, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Bound a wait for the cloud; past it the link fails with TransportTimeout.

        ``timeout_s``: if not that of a step.
        """
        timeout_s = timeout_s or self._settings.step_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            # The session's state on the other side is unknown now; so is the connection's.
            timeout = TransportTimeout(
                f"{self._settings.address} did not answer within {timeout_s:g} s"
            )
            self._fail(timeout)
            self._connection.abort()
            raise timeout from error

    def require_open(self) -> None:
        """Raise what the link has failed with, if it has."""
        if self._failure is not None:
            raise again(self._failure)

    def send(self, message: Message) -> int:
        """Send a message and return its bytes; raises LocalProtocolError.

        It goes out as soon as the connection takes it, whatever becomes of the caller: what was
        said here must be said to the other end, or they would not agree any more. How much can
        wait is bounded by what may be in flight.
        """
        parts = self._wire.send(message)
        self._outbox.post(parts)
        nbytes = sum(map(len, parts))
        self._sent.note(message, nbytes)
        return nbytes

    async def ping(self, timeout_s: float | None = None) -> float:
        """Round trip to the cloud and back in seconds, beside whatever sessions do.

        ``timeout_s``: if not that of a step. Raises as ``LinkSession.end``.
        """
        self.require_open()
        async with self._pinging, self.deadline(timeout_s):
            self._num_pings += 1
            self._answered = asyncio.get_running_loop().create_future()
            started = time.perf_counter()
            self.send(Ping(self._num_pings))
            await self._answered
            round_trip_s = time.perf_counter() - started
        self.require_open()
        return round_trip_s

    async def _keep_alive(self) -> None:
        """Ask whether the cloud is there when nothing came from it for a while.

        A link can be dead without a sign, and a cloud forgets an edge of which it hears nothing.
        """
        counters, keepalive_s = self._connection.counters, self._settings.keepalive_s
        with contextlib.suppress(PrivateLoRAError):  # which the link has failed with
            while self.is_open:
                received = counters.received_frames
                await asyncio.sleep(keepalive_s)
                if counters.received_frames == received:
                    await self.ping(keepalive_s)

    async def _read(self) -> None:
        try:
            while True:
                asked, ended = await self._take()
                for group in _by_point(asked) if len(asked) > 1 else (asked,):
                    self._answer(group)
                for ending in ended:
                    if session := self._sessions.get(ending.session_id):
                        session.resolve(ending)
                if not ended and len(asked) <= 1:
                    continue
                # Whoever waits goes first: the next receive may spin, or need not wait.
                await asyncio.sleep(0)
        except ProtocolError as error:
            self._fail(error)
            await self._say_goodbye(error)
        except PrivateLoRAError as error:
            self._fail(error)
            self._connection.abort()
        except Exception as error:  # a defect, or no memory left: nobody may wait for it in vain
            logger.exception("the link to %s failed", self._settings.address)
            self._fail(PrivateLoRAError(f"answering the cloud failed: {error}"))
            self._connection.abort()

    async def _take(self) -> tuple[list[_Asked], list[Ending]]:
        """Wait for something and take in what is there, within bounds.

        Returns the exchange requests among it, and what has ended.
        """
        asked: list[_Asked] = []
        ended: list[Ending] = []
        num_frames = num_rows = 0
        connection = self._connection
        frame: memoryview | None = await connection.recv()
        while frame is not None:
            message = self._wire.receive(frame)
            match message:
                case ExchangeRequest(session_id, step_id, _, z):
                    session = self._sessions[session_id]
                    session.traffic.received_nbytes += len(frame)
                    if step := session.in_flight.get(step_id):  # else it could not be sent
                        asked.append((message, session, step))
                    num_rows += z.shape[0]
                case StepEnd() | SessionOpened():
                    traffic = self._sessions[message.session_id].traffic
                    traffic.received_nbytes += len(frame)
                    traffic.round_trips += 1
                    ended.append(message)
                case ErrorReply(session_id=None):
                    raise exception_from(message)
                case ErrorReply(session_id=int(session_id)):
                    if failed := self._sessions.pop(session_id, None):
                        failed.fail(exception_from(message))
                case Pong(nonce):
                    if nonce == self._num_pings:  # else whoever asked has gone
                        wake(self._answered)
                case _:  # late, or the end of a session
                    pass
            num_frames += 1
            if num_frames == MAX_FRAMES_AT_ONCE or num_rows >= MAX_ROWS_AT_ONCE:
                break
            frame = connection.recv_nowait() if self._may_hold_more() else None
        return asked, ended

    def _may_hold_more(self) -> bool:
        """Whether more than one message can be on its way: one step is asked one thing at a time.

        For a conversation on its own, looking in vain would cost as much as decoding z.
        """
        if len(self._sessions) != 1:
            return True
        [session] = self._sessions.values()
        return len(session.in_flight) > 1

    def _answer(self, asked: list[_Asked]) -> None:
        """Answer requests for the same point, if there are any."""
        if not asked:
            return
        point = asked[0][0].point
        answers = self._answers(point, [(step.exchanges, asks.z) for asks, _, step in asked])
        for (asks, session, _), y in zip(asked, answers, strict=True):
            if session.failure is not None:
                continue  # it ended meanwhile
            if isinstance(y, ConfigError):
                self._drop(session, y)
                continue
            reply = ExchangeReply(asks.session_id, asks.step_id, point, y)
            session.traffic.sent_nbytes += self.send(reply)
            session.traffic.round_trips += 1

    def _drop(self, session: LinkSession, error: ConfigError) -> None:
        """End one session that this end cannot go on with."""
        self._sessions.pop(session.session_id, None)
        session.fail(error)
        self.send(error_reply(error, session.session_id))

    async def _say_goodbye(self, error: ProtocolError) -> None:
        try:
            self.send(error_reply(error))
            await self._outbox.aclose()
            await self._connection.aclose()
        except (TransportError, ProtocolError):
            self._connection.abort()

    def _fail(self, error: PrivateLoRAError) -> None:
        if self._failure is None:
            self._failure = error
        for session in self._sessions.values():
            session.fail(error)
        wake(self._answered)


def _by_point(asked: list[_Asked]) -> Iterable[list[_Asked]]:
    groups: dict[int, list[_Asked]] = {}
    for each in asked:
        groups.setdefault(each[0].point, []).append(each)
    return groups.values()
