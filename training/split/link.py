"""The trainer's end of a connection to the cloud: one session, and the steps in it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from privatelora.errors import (
    ConnectionClosed,
    PrivateLoRAError,
    ProtocolError,
    RemoteProtocolError,
    TransportError,
    TransportTimeout,
)
from privatelora.runtime.cloud_link import LinkSettings, greet
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.outbox import Outbox
from privatelora.runtime.wire.failures import error_reply, exception_from
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    CloseSession,
    DropStep,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    Fingerprints,
    GradientReply,
    GradientRequest,
    Hello,
    Message,
    OpenSession,
    Ping,
    Pong,
    SessionOpened,
    StepEnd,
    TrainBegin,
)
from privatelora.runtime.wire.state import WireConnection
from privatelora.transports.base import Connection
from privatelora.transports.flow import again, wake

logger = logging.getLogger(__name__)

FromCloud = ExchangeRequest | StepEnd | GradientRequest | BackwardEnd
"""What the cloud says of a step."""
_OF_STEPS = (TrainBegin, ExchangeReply, BackwardBegin, GradientReply, DropStep)
"""What the trainer says of one."""


async def open_training_link(
    settings: LinkSettings, fingerprints: Fingerprints, max_rows: int
) -> TrainingLink:
    """Connect and open a session for batches of up to ``max_rows``.

    Raises as ``cloud_link.greet``, RequestError if the cloud does not train or not so many rows,
    CapacityError if it has no room now.
    """
    link = TrainingLink(*await greet(settings, fingerprints), settings, max_rows)
    try:
        await link.open()
    except BaseException:
        await link.aclose()
        raise
    return link


class TrainingLink:
    """A connection with a session for training. Made by ``open_training_link``."""

    def __init__(
        self,
        connection: Connection,
        wire: WireConnection,
        cloud: Hello,
        codecs: Codecs,
        settings: LinkSettings,
        max_rows: int,
    ) -> None:
        self.codecs = codecs
        self.max_rows = max_rows
        self.session_id = 0
        """Of the only one on this connection."""
        self.max_frame_nbytes = min(cloud.max_frame_nbytes, settings.max_frame_nbytes)
        self.sent_nbytes = self.received_nbytes = 0
        """Of the messages of steps."""
        self._connection = connection
        self._wire = wire
        self._settings = settings
        self._outbox = Outbox(connection)
        self._failure: PrivateLoRAError | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inboxes: dict[int, asyncio.Queue[FromCloud | None]] = {}
        """Of steps in flight; None when the link has failed."""
        self._last_step_id = -1
        self._num_pings = 0
        self._tasks = (
            asyncio.create_task(self._read(), name="privatelora-training-reader"),
            asyncio.create_task(self._keep_alive(), name="privatelora-training-keepalive"),
        )

    @property
    def num_steps(self) -> int:
        """Steps that began and are not over: running, or kept by the cloud."""
        return len(self._inboxes)

    @property
    def is_open(self) -> bool:
        """Whether steps can begin on it."""
        return self._failure is None

    async def open(self) -> None:
        """Open the session."""
        codecs = self.codecs
        down = codecs.hidden_states_down, codecs.exchange_down
        self.send(OpenSession(self.session_id, self.max_rows, *down, training=True))
        async with self._deadline():
            await self._opened
        self._require_open()

    def new_step(self) -> tuple[int, int]:
        """Session and id of the next step; ``hear`` has what comes for it."""
        self._require_open()
        self._last_step_id += 1
        self._inboxes[self._last_step_id] = asyncio.Queue()
        return self.session_id, self._last_step_id

    def forget(self, step_id: int) -> None:
        """Nothing more will come for a step."""
        self._inboxes.pop(step_id, None)

    def send(self, message: Message) -> None:
        """Say something; it goes out as soon as the connection takes it."""
        self._require_open()
        parts = self._wire.send(message)
        if isinstance(message, _OF_STEPS):
            self.sent_nbytes += sum(map(len, parts))
        self._outbox.post(parts)

    async def hear(self, step_id: int) -> FromCloud:
        """The next message of a step; raises what the link fails with."""
        async with self._deadline():
            message = await self._inboxes[step_id].get()
        if message is None:
            self._require_open()
            raise ConnectionClosed("the link to the cloud was closed")
        return message

    async def aclose(self) -> None:
        """Close the connection; the cloud drops what it kept. May be repeated."""
        if self.is_open and self.session_id in self._wire.sessions:
            with contextlib.suppress(PrivateLoRAError):
                self.send(CloseSession(self.session_id))
        self._fail(ConnectionClosed("the link to the cloud was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._outbox.abort()
        await self._connection.aclose()

    def _require_open(self) -> None:
        if self._failure is not None:
            raise again(self._failure)

    @contextlib.asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        timeout_s = self._settings.step_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            timeout = TransportTimeout(
                f"{self._settings.address} did not answer within {timeout_s:g} s"
            )
            self._fail(timeout)
            self._connection.abort()
            raise timeout from error

    async def _keep_alive(self) -> None:
        """Ask whether the cloud is there when nothing came from it for a while."""
        counters, keepalive_s = self._connection.counters, self._settings.keepalive_s
        with contextlib.suppress(PrivateLoRAError):  # which the link has failed with
            while self.is_open:
                received = counters.received_frames
                await asyncio.sleep(keepalive_s)
                if counters.received_frames != received:
                    continue
                self._num_pings += 1
                self.send(Ping(self._num_pings))
                await asyncio.sleep(keepalive_s)
                if counters.received_frames == received:
                    self._fail(
                        TransportTimeout(f"{self._settings.address} has not answered a ping")
                    )
                    self._connection.abort()

    async def _read(self) -> None:
        try:
            while True:
                frame = await self._connection.recv()
                self._take(self._wire.receive(frame), len(frame))
        except ProtocolError as error:
            self._fail(error)
            with contextlib.suppress(TransportError, ProtocolError):
                self._outbox.post(self._wire.send(error_reply(error)))
                await self._outbox.aclose()
            self._connection.abort()
        except PrivateLoRAError as error:
            self._fail(error)
            self._connection.abort()
        except Exception as error:  # a defect, or no memory left: nobody may wait for it in vain
            logger.exception("the link to %s failed", self._settings.address)
            self._fail(PrivateLoRAError(f"reading from the cloud failed: {error}"))
            self._connection.abort()

    def _take(self, message: Message | None, nbytes: int) -> None:
        match message:
            case ExchangeRequest() | StepEnd() | GradientRequest() | BackwardEnd():
                self.received_nbytes += nbytes
                if inbox := self._inboxes.get(message.step_id):
                    inbox.put_nowait(message)
            case SessionOpened():
                wake(self._opened)
            case ErrorReply():
                raise exception_from(message)
            case Pong() | None:
                pass
            case _:
                raise RemoteProtocolError(f"the cloud said {type(message).__name__}")

    def _fail(self, error: PrivateLoRAError) -> None:
        if self._failure is None:
            self._failure = error
        wake(self._opened)
        for inbox in self._inboxes.values():
            inbox.put_nowait(None)
