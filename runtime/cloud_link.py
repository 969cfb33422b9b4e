"""The edge's end of one connection to the cloud, shared by all its sequences.

One reader task takes every frame. It answers exchanges itself, without waking the sequence
they belong to: an answer is due at once, and a sequence has nothing to decide until its step
ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from privatelora import __version__
from privatelora.errors import (
    ConfigError,
    ConnectionClosed,
    LocalProtocolError,
    PrivateLoRAError,
    ProtocolError,
    RemoteProtocolError,
    TransportError,
    TransportTimeout,
)
from privatelora.runtime.codecs import CodecPreferences, Codecs, choose_codecs
from privatelora.runtime.language_model import Traffic
from privatelora.runtime.link_config import ImpairedConfig
from privatelora.runtime.payload.codec import CODEC_NAMES
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
    OutputRows,
    Role,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.runtime.wire.state import WireConnection
from privatelora.transports.base import NO_CREDENTIALS, Connection, Credentials, Limits
from privatelora.transports.flow import again
from privatelora.transports.impaired import impaired
from privatelora.transports.registry import connect

logger = logging.getLogger(__name__)

Answer = Callable[[int, TensorPayload], TensorPayload]
"""From an exchange point's index and z to y; raises RemoteProtocolError for an impossible z."""


@dataclass(frozen=True)
class LinkSettings:
    """How an edge reaches its cloud. Times in seconds."""

    address: str
    codecs: CodecPreferences
    credentials: Credentials = NO_CREDENTIALS
    impaired: ImpairedConfig | None = None
    connect_timeout_s: float = 10.0
    step_timeout_s: float = 120.0
    max_frame_nbytes: int = 64 * 2**20
    spin_s: float | None = None


async def open_link(settings: LinkSettings, fingerprints: Fingerprints) -> CloudLink:
    """Connect and greet.

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
    return CloudLink(connection, wire, settings, theirs, codecs)


class CloudLink:
    """An open, greeted connection. Made by ``open_link``."""

    def __init__(
        self,
        connection: Connection,
        wire: WireConnection,
        settings: LinkSettings,
        cloud: Hello,
        codecs: Codecs,
    ) -> None:
        self.cloud = cloud
        """What the cloud said of itself and offers."""
        self.codecs = codecs
        """What was agreed with it."""
        self._connection = connection
        self._wire = wire
        self._settings = settings
        self._sessions: dict[int, LinkSession] = {}
        self._last_session_id = -1
        self._failure: PrivateLoRAError | None = None
        self._reader = asyncio.create_task(self._read(), name="privatelora-link-reader")

    @property
    def is_open(self) -> bool:
        """Whether sequences can still be opened and stepped on this link."""
        return self._failure is None

    async def open_session(self, max_positions: int, answer: Answer) -> LinkSession:
        """Make a session whose exchanges ``answer`` answers."""
        self._last_session_id += 1
        session = LinkSession(self, self._last_session_id, answer)
        self._sessions[session.session_id] = session
        down = self.codecs.hidden_states_down, self.codecs.exchange_down
        try:
            await self.ask(session, OpenSession(session.session_id, max_positions, *down))
        except BaseException:
            await self.close_session(session)
            raise
        return session

    async def close_session(self, session: LinkSession) -> None:
        """Free a session; a step in flight is dropped. May be repeated, never raises."""
        if self._sessions.pop(session.session_id, None) is None:
            return
        session.fail(ConnectionClosed("the sequence was closed"))
        if self.is_open and session.session_id in self._wire.sessions:
            with contextlib.suppress(TransportError):  # a lost link frees its sessions anyway
                await self._send(CloseSession(session.session_id))

    async def aclose(self) -> None:
        """Close the connection and everything on it. May be repeated."""
        self._fail(ConnectionClosed("the link to the cloud was closed"))
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._connection.aclose()

    async def ask(self, session: LinkSession, message: Message) -> Message:
        """Send a message of ``session`` and wait for what ends it."""
        if self._failure is not None:
            raise again(self._failure)
        if session.failure is not None:
            raise ConnectionClosed(f"the sequence has ended: {session.failure}")
        session.expect()
        async with self.deadline():
            try:
                session.traffic.sent_nbytes += await self._send(message)
            except PrivateLoRAError:
                session.in_flight = False  # it was not said, so nothing will end it
                raise
            return await session.result()

    @contextlib.asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Bound a wait for the cloud; past it the link fails with TransportTimeout."""
        try:
            async with asyncio.timeout(self._settings.step_timeout_s):
                yield
        except TimeoutError as error:
            # The session's state on the other side is unknown now; so is the connection's.
            timeout = TransportTimeout(
                f"{self._settings.address} did not answer within "
                f"{self._settings.step_timeout_s:g} s"
            )
            self._fail(timeout)
            self._connection.abort()
            raise timeout from error

    async def _send(self, message: Message) -> int:
        parts = self._wire.send(message)
        try:
            await self._connection.send(*parts)
        except asyncio.CancelledError:
            # Said for this end and perhaps not for the other: they would not agree any more.
            self._fail(ConnectionClosed("a message to the cloud was cut off"))
            self._connection.abort()
            raise
        return sum(map(len, parts))

    async def _read(self) -> None:
        try:
            while True:
                frame = await self._connection.recv()
                message = self._wire.receive(frame)
                match message:
                    case ExchangeRequest(session_id, step_id, point, z):
                        session = self._sessions[session_id]
                        try:
                            y = session.answer(point, z)
                        except ConfigError as error:  # the codec cannot carry a value
                            await self._drop(session, error)
                            continue
                        reply = ExchangeReply(session_id, step_id, point, y)
                        traffic = session.traffic
                        traffic.sent_nbytes += await self._send(reply)
                        traffic.received_nbytes += len(frame)
                        traffic.round_trips += 1
                    case StepEnd() | SessionOpened():
                        session = self._sessions[message.session_id]
                        session.traffic.received_nbytes += len(frame)
                        session.traffic.round_trips += 1
                        session.resolve(message)
                        # Whoever waited goes first: the next receive may spin.
                        await asyncio.sleep(0)
                    case ErrorReply(session_id=None):
                        raise exception_from(message)
                    case ErrorReply(session_id=int(session_id)):
                        if failed := self._sessions.pop(session_id, None):
                            failed.fail(exception_from(message))
                    case _:  # late, or the end of a session
                        pass
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

    async def _drop(self, session: LinkSession, error: ConfigError) -> None:
        """End one session that this end cannot go on with."""
        self._sessions.pop(session.session_id, None)
        session.fail(error)
        await self._send(error_reply(error, session.session_id))

    async def _say_goodbye(self, error: ProtocolError) -> None:
        try:
            await self._send(error_reply(error))
            await self._connection.aclose()
        except (TransportError, ProtocolError):
            self._connection.abort()

    def _fail(self, error: PrivateLoRAError) -> None:
        if self._failure is None:
            self._failure = error
        for session in self._sessions.values():
            session.fail(error)


class LinkSession:
    """One session on a link. Made by ``CloudLink.open_session``; one step at a time."""

    def __init__(self, link: CloudLink, session_id: int, answer: Answer) -> None:
        self.session_id = session_id
        self.answer = answer
        self.traffic = Traffic()
        self.in_flight = False
        """Something was asked and has not ended, whether somebody still waits for it or not."""
        self.failure: PrivateLoRAError | None = None
        """Why the session is over."""
        self._reply: Message | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._link = link
        self._last_step_id = -1

    async def step(
        self,
        position: int,
        output_rows: OutputRows,
        hidden_states: TensorPayload,
        opening: TensorPayload | None,
    ) -> TensorPayload:
        """Run one step to its end; the final hidden states of the rows asked for.

        After a step whose caller was cancelled, ``settle`` first.
        """
        self._last_step_id = step_id = self._last_step_id + 1
        begin = StepBegin(self.session_id, step_id, position, output_rows, hidden_states, opening)
        reply = await self._link.ask(self, begin)
        if not isinstance(reply, StepEnd) or reply.step_id != step_id:
            raise RemoteProtocolError(f"the cloud answered step {step_id} with {reply!r}")
        return reply.hidden_states

    async def settle(self) -> None:
        """Wait for the end of a step whose caller was cancelled, if there is one."""
        if self.in_flight:
            async with self._link.deadline():
                await self.result()

    async def aclose(self) -> None:
        """Free the session. May be repeated, never raises."""
        await self._link.close_session(self)

    async def result(self) -> Message:
        """Wait for the message that ends what was asked; raise what the session fails with."""
        while self.in_flight:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        reply, self._reply = self._reply, None
        if reply is None:
            raise again(self.failure or LocalProtocolError("nothing was asked of the cloud"))
        return reply

    def expect(self) -> None:
        """Something is about to be asked."""
        self.in_flight, self._reply = True, None

    def resolve(self, message: Message) -> None:
        """Hand the awaited message to whoever waits."""
        self._reply = message
        self._end()

    def fail(self, error: PrivateLoRAError) -> None:
        """End the session: raise ``error`` in whoever waits."""
        self.failure = self.failure or error
        self._end()

    def _end(self) -> None:
        self.in_flight = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
