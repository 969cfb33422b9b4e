"""One connected edge: its messages, in order, and its sessions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from privatelora.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    PrivateLoRAError,
    ProtocolError,
    RemoteProtocolError,
    RequestError,
    SessionEvicted,
    TransportError,
)
from privatelora.partition.plan import ExchangePoint
from privatelora.runtime.engine import Step
from privatelora.runtime.kv_cache import KVCache
from privatelora.runtime.outbox import Outbox
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.rate_limit import RateLimit
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.wire.failures import error_reply
from privatelora.runtime.wire.handshake import check_hello
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    CloseSession,
    DropStep,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    Hello,
    Message,
    OpenSession,
    OutputRows,
    Ping,
    Pong,
    Role,
    SessionClosed,
    SessionOpened,
    StepBegin,
    StepEnd,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import MAX_PINGS, MAX_SESSIONS, MAX_STEPS, WireLimits
from privatelora.runtime.wire.state import WireConnection
from privatelora.transports.base import Connection

if TYPE_CHECKING:
    from privatelora.runtime.cloud_service import CloudService
    from privatelora.runtime.training_session import FromTrainer, TrainingSession

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
GOODBYE_TIMEOUT_S = 5.0
MAX_CONTROL_PER_S = 100.0
"""Messages that are no part of a step, from one edge. Those beyond it are read later: they cost the
cloud time that no account counts."""
MAX_FRAMES_AT_ONCE = 64
"""Frames taken from one edge before others have a turn."""
MAX_UNREAD = MAX_SESSIONS * (MAX_STEPS + 1) + MAX_PINGS
"""More than can wait for an edge that hears its answers before it asks on: one for each step in
flight, each session and each ping."""


@dataclass
class Session:
    """A sequence of one edge, or a trainer. ``number``: unique over the cloud."""

    number: int
    session_id: int
    peer: CloudPeer
    kv: KVCache
    hidden_codec: str
    exchange_codec: str
    last_used: float = field(default_factory=time.monotonic)
    num_positions: int = 0
    """Positions begun so far; the next step starts here or earlier."""
    token_digest: str | None = None
    """Of the token with which it can be resumed."""
    steps: dict[int, Step] = field(default_factory=dict)
    """In flight, oldest first."""
    training: TrainingSession | None = None
    """What its messages are for, instead of a sequence."""


_OF_STEPS = (StepBegin, ExchangeReply, TrainBegin, BackwardBegin, GradientReply)


class CloudPeer:
    """Takes an edge's messages and posts the answers."""

    def __init__(
        self,
        service: CloudService,
        connection: Connection,
        identify: Callable[[str | None], str],
    ) -> None:
        """``identify`` takes the edge's token to its client, or raises AuthError."""
        self.client = ""
        """On whose account it runs, once it has said Hello."""
        self._identify = identify
        self._service = service
        self._engine = service.engine
        self._connection = connection
        self._outbox = Outbox(connection)
        self._wire = WireConnection(Role.CLOUD, WireLimits())
        self._sessions: dict[int, Session] = {}
        self._has_begun_step = False
        self._control = RateLimit(MAX_CONTROL_PER_S)
        self._watching: asyncio.TimerHandle

    @property
    def name(self) -> str:
        """Where it is, for the log."""
        return self._connection.peer

    async def run(self) -> None:
        """Greet, then answer messages in the order they come."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = self._wire.receive(await self._connection.recv())
        except TimeoutError as error:
            raise RemoteProtocolError(f"no Hello within {HELLO_TIMEOUT_S:.0f} s") from error
        if not isinstance(hello, Hello):
            raise RemoteProtocolError("the first message must be Hello")
        self.client = self._identify(hello.token)
        check_hello(self._service.hello, hello)
        self._service.connections.admit(self, self.client)
        self.post(self._service.hello)
        logger.info("%s joined as %s: %s", self.name, self.client, hello.software)
        self._watch(partial(self._identify, hello.token), -1)
        try:
            await self._listen()
        finally:
            self._watching.cancel()

    async def _listen(self) -> None:
        while True:
            is_over = self._take_frame(await self._connection.recv())
            for _ in range(MAX_FRAMES_AT_ONCE):
                # Looking in vain takes time, and only pays where a batch is being collected.
                gathers = self._service.runner.is_due and not is_over
                frame = self._connection.recv_nowait() if gathers else None
                if frame is None:
                    break
                is_over = self._take_frame(frame)
            if is_over:
                return
            if (delay_s := self._control.delay(time.monotonic())) > 0:
                await asyncio.sleep(delay_s)
            if self._service.runner.is_due or self._has_begun_step:
                # What has arrived is part of the next batch, which runs before this looks again;
                # and once a step, others have a turn whatever is there.
                self._has_begun_step = False
                await asyncio.sleep(0)

    def _watch(self, identify: Callable[[], str], num_frames: int) -> None:
        """Look now and then whether the edge is still there and still welcome."""
        loop = asyncio.get_running_loop()
        received = self._connection.counters.received_frames
        limit_s = self._service.limits.max_silence_s
        try:
            if received == num_frames:
                self.drop(f"nothing came from it for {limit_s:g} s")
                return
            if not self._connection.is_trusted:
                self.drop("the keys that this cloud trusts have changed")  # it may come again
                return
            if identify() != self.client:
                raise AuthError("this token is somebody else's now")
        except AuthError as error:
            logger.warning("%s shut out: %s", self.name, error)
            self.close_all()
            self.post(error_reply(error))
            # It leaves when it hears that, or else is made to.
            self._watching = loop.call_later(GOODBYE_TIMEOUT_S, self._connection.abort)
            return
        self._watching = loop.call_later(limit_s, self._watch, identify, received)

    def drop(self, reason: str) -> None:
        """End the connection at once; ``run`` learns of it."""
        logger.info("%s dropped: %s", self.name, reason)
        self._connection.abort()

    async def say_goodbye(self, error: PrivateLoRAError) -> None:
        """Tell the edge why the connection ends, as far as it still can be told."""
        try:
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                self.post(error_reply(error))
                await self._outbox.aclose()
        except (TimeoutError, TransportError, ProtocolError):
            self._connection.abort()

    def close_all(self) -> None:
        """Free everything this edge held but what it may come back for."""
        for session_id in list(self._sessions):
            self._close(session_id, may_return=True)
        self._service.withdraw_all(self)
        self._outbox.abort()

    def admit(self, message: OpenSession) -> None:
        """Open a session for which there is room."""
        try:
            session, token = self._service.open_session(self, message)
        except (RequestError, CapacityError) as error:
            self.refuse(message.session_id, error)
            return
        self._sessions[message.session_id] = session
        self.post(
            SessionOpened(message.session_id, message.max_positions, session.num_positions, token)
        )

    def refuse(self, session_id: int, error: PrivateLoRAError) -> None:
        """Do not let a session in, and say why."""
        self._service.metrics.sessions_refused += 1
        self.fail(session_id, error)

    def fail(self, session_id: int, error: PrivateLoRAError) -> None:
        """End one session and say why; the others go on."""
        logger.info("%s session %d: %s", self.name, session_id, error)
        self._close(session_id)
        self.post(error_reply(error, session_id))

    def lose(self, session_id: int) -> None:
        """A session goes on on another connection."""
        self._close(session_id, may_return=True)
        self.post(error_reply(SessionEvicted("it was resumed on another connection"), session_id))

    def post(self, message: Message) -> None:
        """Say ``message``, which is legal now."""
        self._outbox.post(self._wire.send(message))

    def _take_frame(self, frame: memoryview) -> bool:
        """Act on one frame; return whether the edge has said its last word."""
        message = self._wire.receive(frame)
        if not isinstance(message, _OF_STEPS):
            self._control.take(time.monotonic())
        if self._outbox.num_waiting > MAX_UNREAD:
            raise RemoteProtocolError(
                f"it does not read: {self._outbox.num_waiting} messages wait for it"
            )
        match message:
            case ErrorReply(session_id=None):
                logger.warning("%s reports: %s", self.name, message.message)
                return True
            case ExchangeReply(session_id=session_id):
                training = self._sessions[session_id].training
                if training is None:
                    self._continue_step(message)
                else:
                    self._train(training, message)
            case TrainBegin() | BackwardBegin() | GradientReply() | DropStep():
                if (training := self._sessions[message.session_id].training) is not None:
                    self._train(training, message)
            case StepBegin():
                try:
                    self._begin_step(message)
                except (RequestError, CapacityError) as error:
                    self.fail(message.session_id, error)
            case OpenSession():
                self._open(message)
            case Ping(nonce=nonce):
                self.post(Pong(nonce))
            case CloseSession(session_id=session_id):
                self._close(session_id)
                self.post(SessionClosed(session_id))
            case ErrorReply(session_id=int(session_id)):
                logger.warning("%s reports: %s", self.name, message.message)
                self._close(session_id)
                self.post(SessionClosed(session_id))
        return False

    def _open(self, message: OpenSession) -> None:
        try:
            for codec in (message.hidden_codec, message.exchange_codec):
                if codec not in CODEC_NAMES:
                    raise RequestError(
                        f"this cloud cannot write {codec}; it knows {', '.join(CODEC_NAMES)}"
                    )
            self._service.ask_for_room(self, message)
        except (RequestError, CapacityError) as error:
            self.refuse(message.session_id, error)

    def _close(self, session_id: int, *, may_return: bool = False) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._service.close_session(session, may_return=may_return)
        else:
            self._service.withdraw(self, session_id)

    def _begin_step(self, message: StepBegin) -> None:
        session = self._sessions[message.session_id]
        plan, engine = self._service.plan, self._engine
        n, position = message.hidden_states.shape[0], message.position
        require_shape(message.hidden_states.shape, n, engine.config.hidden_size, "hidden states")
        if position > session.num_positions or (session.steps and position < session.num_positions):
            raise RemoteProtocolError(
                f"a step begins at position {position} of a sequence of {session.num_positions}"
                + (" with steps in flight" if session.steps else "")
            )
        # Before the numbers are unpacked: compressed, they may stand for far more memory.
        self._service.make_room(session, position, n)
        num_opening = len(plan.opening_layers)
        if (message.opening is None) != (num_opening == 0):
            raise RemoteProtocolError(f"a step must bring y of {num_opening} layers")
        if message.opening is not None:
            require_shape(message.opening.shape, n, num_opening * plan.y_size, "opening y")
        hidden_states = unpack(message.hidden_states, engine.device, engine.dtype)
        step = engine.begin(hidden_states, position, session.kv)
        if message.opening is not None:
            y = unpack(message.opening, engine.device, engine.dtype)
            step.supply(plan.opening_layers, y)
        session.num_positions = position + n
        session.steps[message.step_id] = step
        self._has_begun_step = True
        begin = partial(
            self._service.runner.begin,
            session.number,
            message.step_id,
            step,
            partial(self._deliver, session, message.step_id, message.output_rows),
            partial(self.fail, session.session_id),
        )
        self._service.accounts.begin(self.client, session.number, begin)

    def _train(self, training: TrainingSession, message: FromTrainer) -> None:
        try:
            training.take(message)
        except (RequestError, CapacityError) as error:
            self.fail(message.session_id, error)

    def _continue_step(self, message: ExchangeReply) -> None:
        session = self._sessions[message.session_id]
        step = session.steps[message.step_id]
        layers = self._service.reply_layers[message.point]
        y_size = self._service.plan.y_size
        require_shape(message.y.shape, step.context.num_positions, len(layers) * y_size, "y")
        y = unpack(message.y, self._engine.device, self._engine.dtype)
        self._service.runner.supply(session.number, message.step_id, layers, y)

    def _deliver(
        self,
        session: Session,
        step_id: int,
        output_rows: OutputRows,
        step: Step,
        point: ExchangePoint | None,
    ) -> None:
        """Send what a step has come to."""
        try:
            if point is not None and step.z is not None:
                z = pack(step.z, session.exchange_codec)
                self.post(ExchangeRequest(session.session_id, step_id, point.index, z))
                return
            del session.steps[step_id]
            self._service.note_used(session, step.context.num_positions)
            rows = step.hidden_states
            if output_rows is not OutputRows.ALL:
                rows = rows[-1:] if output_rows is OutputRows.LAST else rows[:0]
            returned = pack(rows, session.hidden_codec)
            self.post(StepEnd(session.session_id, step_id, returned))
        except ConfigError as error:  # the codec cannot carry a value
            self.fail(session.session_id, error)


def require_shape(shape: tuple[int, int], rows: int, features: int, what: str) -> None:
    """Raise RemoteProtocolError unless a tensor has the shape that is due."""
    if shape != (rows, features):
        raise RemoteProtocolError(
            f"{what} of {shape[0]} x {shape[1]} came where {rows} x {features} was due"
        )
