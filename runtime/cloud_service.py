"""The cloud's side of the conversation: sessions of many edges over one engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass, field

from privatelora import __version__
from privatelora.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    ConnectionClosed,
    PartitionError,
    PrivateLoRAError,
    ProtocolError,
    RemoteProtocolError,
    RequestError,
    TransportError,
)
from privatelora.partition.plan import Plan
from privatelora.runtime.engine import Engine, Step
from privatelora.runtime.kv_cache import KVCache
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.wire.failures import error_reply
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
    SessionClosed,
    SessionOpened,
    StepBegin,
    StepEnd,
)
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.runtime.wire.state import WireConnection
from privatelora.transports.base import Connection

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
GOODBYE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class CloudLimits:
    """What one cloud gives away at most."""

    max_sessions: int
    max_positions: int
    max_cached_positions: int
    max_frame_nbytes: int


@dataclass
class _RunningStep:
    step: Step
    output_rows: OutputRows


@dataclass
class _Session:
    kv: KVCache
    hidden_codec: str
    exchange_codec: str
    num_positions: int = 0
    """Positions begun so far; the next step starts here or earlier."""
    steps: dict[int, _RunningStep] = field(default_factory=dict)
    """In flight, oldest first."""


class CloudService:
    """Serves every connection that a listener hands to ``handle``."""

    def __init__(
        self, engine: Engine, plan: Plan, fingerprints: Fingerprints, limits: CloudLimits
    ) -> None:
        self.engine = engine
        self.plan = plan
        self.limits = limits
        self.hello = Hello(
            role=Role.CLOUD,
            software=f"privatelora/{__version__}",
            fingerprints=fingerprints,
            codecs=CODEC_NAMES,
            max_frame_nbytes=limits.max_frame_nbytes,
            max_positions=limits.max_positions,
            max_sessions=limits.max_sessions,
        )
        self.reply_layers = {
            point.index: plan.span_in(point, plan.cloud_layers) for point in plan.wire_points
        }
        self._num_sessions = 0
        self._num_cached_positions = 0

    async def handle(self, connection: Connection) -> None:
        """Serve one edge until it leaves or breaks the protocol."""
        peer = _Peer(self, connection)
        try:
            await peer.run()
        except ConnectionClosed as error:
            logger.info("%s left: %s", connection.peer, error)
        except (ProtocolError, PartitionError, TransportError, AuthError) as error:
            logger.warning("%s refused: %s", connection.peer, error)
            peer.close_all()
            await peer.say_goodbye(error)
        finally:
            peer.close_all()

    def reserve(self, max_positions: int) -> KVCache:
        """Make room for one more sequence. Raises RequestError or CapacityError."""
        limits = self.limits
        if not 0 < max_positions <= limits.max_positions:
            raise RequestError(
                f"a sequence of {max_positions} positions is not possible; this cloud offers up "
                f"to {limits.max_positions}"
            )
        if self._num_sessions >= limits.max_sessions:
            raise CapacityError(
                f"this cloud serves {limits.max_sessions} sessions already; try again later"
            )
        left = limits.max_cached_positions - self._num_cached_positions
        if max_positions > left:
            raise CapacityError(
                f"this cloud's KV cache has {left} positions left and {max_positions} were asked "
                "for; try again later or ask for a shorter sequence"
            )
        try:
            kv = self.engine.new_cache(max_positions)
        except (RuntimeError, MemoryError) as error:  # torch reports exhausted memory as either
            raise CapacityError("this cloud has no memory left; try again later") from error
        self._num_sessions += 1
        self._num_cached_positions += max_positions
        return kv

    def release(self, kv: KVCache) -> None:
        """Give back what ``reserve`` took."""
        self._num_sessions -= 1
        self._num_cached_positions -= kv.capacity


class _Peer:
    """One connected edge."""

    def __init__(self, service: CloudService, connection: Connection) -> None:
        self._service = service
        self._engine = service.engine
        self._connection = connection
        self._wire = WireConnection(Role.CLOUD, WireLimits())
        self._sessions: dict[int, _Session] = {}

    async def run(self) -> None:
        """Greet, then answer messages in the order they come."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await self._receive()
        except TimeoutError as error:
            raise RemoteProtocolError(f"no Hello within {HELLO_TIMEOUT_S:.0f} s") from error
        if not isinstance(hello, Hello):
            raise RemoteProtocolError("the first message must be Hello")
        check_hello(self._service.hello, hello)
        await self._send(self._service.hello)
        identity = self._connection.identity or "without proof of identity"
        logger.info("%s joined: %s, %s", self._connection.peer, hello.software, identity)
        while True:
            message = await self._receive()
            match message:
                case ExchangeReply():
                    await self._guard(message.session_id, self._continue_step(message))
                case StepBegin():
                    await self._guard(message.session_id, self._begin_step(message))
                    # A peer whose messages are always there already must not keep others waiting.
                    await asyncio.sleep(0)
                case OpenSession():
                    await self._guard(message.session_id, self._open(message))
                case CloseSession():
                    self._close(message.session_id)
                    await self._send(SessionClosed(message.session_id))
                case ErrorReply():
                    logger.warning("%s reports: %s", self._connection.peer, message.message)
                    if message.session_id is None:
                        return
                    self._close(message.session_id)
                    await self._send(SessionClosed(message.session_id))

    async def say_goodbye(self, error: PrivateLoRAError) -> None:
        """Tell the edge why the connection ends, as far as it still can be told."""
        try:
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                await self._send(error_reply(error))
        except (TimeoutError, TransportError, ProtocolError):
            self._connection.abort()

    def close_all(self) -> None:
        """Free everything this edge held."""
        for session_id in list(self._sessions):
            self._close(session_id)

    async def _receive(self) -> Message | None:
        return self._wire.receive(await self._connection.recv())

    async def _send(self, message: Message) -> None:
        await self._connection.send(*self._wire.send(message))

    async def _guard(self, session_id: int, work: Awaitable[None]) -> None:
        """Turn a failure that concerns one session into an ErrorReply for it alone."""
        try:
            await work
        except (RequestError, CapacityError, ConfigError) as error:
            logger.info("%s session %d: %s", self._connection.peer, session_id, error)
            self._close(session_id)
            await self._send(error_reply(error, session_id))

    async def _open(self, message: OpenSession) -> None:
        for codec in (message.hidden_codec, message.exchange_codec):
            if codec not in CODEC_NAMES:
                raise RequestError(
                    f"this cloud cannot write {codec}; it knows {', '.join(CODEC_NAMES)}"
                )
        kv = self._service.reserve(message.max_positions)
        self._sessions[message.session_id] = _Session(
            kv, message.hidden_codec, message.exchange_codec
        )
        await self._send(SessionOpened(message.session_id, kv.capacity))

    def _close(self, session_id: int) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._service.release(session.kv)

    async def _begin_step(self, message: StepBegin) -> None:
        session = self._sessions[message.session_id]
        plan, engine = self._service.plan, self._engine
        n, position = message.hidden_states.shape[0], message.position
        _require_shape(message.hidden_states.shape, n, engine.config.hidden_size, "hidden states")
        if position > session.num_positions or (session.steps and position < session.num_positions):
            raise RemoteProtocolError(
                f"a step begins at position {position} of a sequence of {session.num_positions}"
                + (" with steps in flight" if session.steps else "")
            )
        session.kv.check_room(position, n)  # a compressed tensor may be small and have many rows
        hidden_states = unpack(message.hidden_states, engine.device, engine.dtype)
        step = engine.begin(hidden_states, position, session.kv)
        num_opening = len(plan.opening_layers)
        if (message.opening is None) != (num_opening == 0):
            raise RemoteProtocolError(f"a step must bring y of {num_opening} layers")
        if message.opening is not None:
            _require_shape(message.opening.shape, n, num_opening * plan.y_size, "opening y")
            y = unpack(message.opening, engine.device, engine.dtype)
            step.supply(plan.opening_layers, y)
        session.num_positions = position + n
        session.steps[message.step_id] = _RunningStep(step, message.output_rows)
        await self._advance(message.session_id, message.step_id, session)

    async def _continue_step(self, message: ExchangeReply) -> None:
        session = self._sessions[message.session_id]
        step = session.steps[message.step_id].step
        layers = self._service.reply_layers[message.point]
        y_size = self._service.plan.y_size
        rows = step.hidden_states.shape[0]
        _require_shape(message.y.shape, rows, len(layers) * y_size, "y")
        for step_id, earlier in session.steps.items():
            if step_id == message.step_id:
                break
            if earlier.step.layer_idx <= step.layer_idx:
                raise RemoteProtocolError(
                    f"step {message.step_id} may not pass step {step_id}, which comes before it"
                )
        step.supply(layers, unpack(message.y, self._engine.device, self._engine.dtype))
        await self._advance(message.session_id, message.step_id, session)

    async def _advance(self, session_id: int, step_id: int, session: _Session) -> None:
        running = session.steps[step_id]
        step = running.step
        point = self._engine.advance(step)
        if point is not None and step.z is not None:
            z = pack(step.z, session.exchange_codec)
            await self._send(ExchangeRequest(session_id, step_id, point.index, z))
            self._engine.precompute(step)
            return
        del session.steps[step_id]
        rows = step.hidden_states
        if running.output_rows is not OutputRows.ALL:
            rows = rows[-1:] if running.output_rows is OutputRows.LAST else rows[:0]
        await self._send(StepEnd(session_id, step_id, pack(rows, session.hidden_codec)))


def _require_shape(shape: tuple[int, int], rows: int, features: int, what: str) -> None:
    if shape != (rows, features):
        raise RemoteProtocolError(
            f"{what} of {shape[0]} x {shape[1]} came where {rows} x {features} was due"
        )
