"""The cloud's side of the conversation: sessions of many edges over one engine.

A session waits its turn at the door when there is no room (``ask_for_room``), gets memory as its
positions are used (``make_room``), and may lose it again while it is idle: its edge holds the
text and rebuilds the cache when it goes on. When its connection is lost, its cache is kept for a
while, for the edge to come back with the session's token.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from privatelora import __version__
from privatelora.errors import (
    AuthError,
    CapacityError,
    CloudDraining,
    ConnectionClosed,
    PartitionError,
    ProtocolError,
    RequestError,
    SessionEvicted,
    TransportError,
)
from privatelora.partition.plan import Plan
from privatelora.runtime.batch_runner import BatchRunner, Observer
from privatelora.runtime.client_accounts import ClientAccounts, ClientLimits
from privatelora.runtime.client_tokens import KnownTokens, digest, identify
from privatelora.runtime.cloud_peer import CloudPeer, Session
from privatelora.runtime.connection_limits import ConnectionLimits
from privatelora.runtime.detached import Detached, DetachedCaches, new_resume_token
from privatelora.runtime.engine import Engine
from privatelora.runtime.kv_cache import KVCache
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.scheduler import Scheduler
from privatelora.runtime.telemetry import CloudMetrics, Occupancy
from privatelora.runtime.training_session import TrainingLimits, TrainingService
from privatelora.runtime.wire.messages import Fingerprints, Hello, OpenSession, Role
from privatelora.transports.base import Connection
from privatelora.transports.brief_log import BriefLog

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 0.1
"""How often a cloud that ends looks for sessions that have become idle."""


@dataclass(frozen=True)
class CloudLimits:
    """What one cloud gives away at most.

    What ends in ``per_client`` is of ``ClientLimits``, but for connections.
    ``max_connections``: of edges that have greeted. ``max_silence_s``: how long nothing may come
    from one of them; at the latest after twice as long it is dropped. ``max_batch_rows``: rows that
    the engine computes at once; a longer step runs alone. ``max_waiting``: sessions that wait for
    room; ``max_wait_s``: how long. ``min_idle_s``: how long a session must have been idle before
    its memory may go to another. ``resume_timeout_s``: how long the cache of a session is kept
    whose connection was lost; 0 is not at all. ``training``: None is not at all.
    """

    max_sessions: int
    max_positions: int
    max_cached_positions: int
    max_frame_nbytes: int
    max_connections: int = 1024
    max_connections_per_client: int = 64
    max_silence_s: float = 60.0
    max_sessions_per_client: int = 16
    max_cached_positions_per_client: int | None = None
    max_steps_per_s_per_client: float | None = None
    max_batch_rows: int = 64
    max_waiting: int = 64
    max_wait_s: float = 10.0
    min_idle_s: float = 2.0
    resume_timeout_s: float = 120.0
    training: TrainingLimits | None = None


@dataclass
class _Waiting:
    peer: CloudPeer
    message: OpenSession
    timer: asyncio.TimerHandle


class CloudService:
    """Serves every connection that a listener hands to ``handle``."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        fingerprints: Fingerprints,
        limits: CloudLimits,
        observer: Observer | None = None,
        make_scheduler: Callable[..., Scheduler] = Scheduler,
        tokens: KnownTokens | None = None,
    ) -> None:
        """Serve those who have one of ``tokens``, or everybody.

        ``make_scheduler`` takes ``num_segments`` and ``max_batch_rows``.
        """
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
            capabilities=() if limits.training is None else ("training",),
        )
        self.reply_layers = {
            point.index: plan.span_in(point, plan.cloud_layers) for point in plan.wire_points
        }
        scheduler = make_scheduler(
            num_segments=len(plan.wire_points) + 1, max_batch_rows=limits.max_batch_rows
        )
        self.metrics = CloudMetrics(self._occupancy)
        observers = (self.metrics,) if observer is None else (self.metrics, observer)
        self.runner = BatchRunner(engine, scheduler, observers)
        self._training = TrainingService(
            engine, plan, limits.training, self.runner, limits.max_batch_rows, limits.min_idle_s
        )
        self._pool = engine.new_pool(limits.max_cached_positions)
        self._tokens = tokens
        self.accounts = ClientAccounts(
            ClientLimits(
                limits.max_sessions_per_client,
                limits.max_cached_positions_per_client,
                limits.max_steps_per_s_per_client,
            )
        )
        self.connections = ConnectionLimits(
            limits.max_connections, limits.max_connections_per_client
        )
        self._numbers = itertools.count()
        self._sessions: OrderedDict[int, Session] = OrderedDict()
        """By number; those not used for longest first."""
        self._resumable: dict[str, Session] = {}
        """By the digests of their tokens."""
        self._detached = DetachedCaches(limits.resume_timeout_s, limits.max_sessions_per_client)
        self._waiting: OrderedDict[tuple[CloudPeer, int], _Waiting] = OrderedDict()
        self._is_draining = False
        self._log = BriefLog(logger)

    async def handle(self, connection: Connection) -> None:
        """Serve one edge until it leaves or breaks the protocol."""
        peer = CloudPeer(self, connection, partial(identify, connection, tokens=self._tokens))
        with self.metrics.counting(connection):
            try:
                self.connections.arrive(peer)
                if self._is_draining:
                    raise _shutting_down()
                await peer.run()
            except ConnectionClosed as error:
                logger.info("%s left: %s", connection.peer, error)
            except CapacityError as error:
                logger.info("%s turned away: %s", connection.peer, error)
                await peer.say_goodbye(error)
            except (ProtocolError, PartitionError, TransportError, AuthError) as error:
                self._log.warning("%s refused: %s", connection.peer, error)
                peer.close_all()
                await peer.say_goodbye(error)
            finally:
                peer.close_all()
                self.connections.leave(peer)

    async def drain(self, timeout_s: float) -> None:
        """Let nobody in any more; return when no session is left or ``timeout_s`` is over.

        Sessions go on until their edge closes them or they are idle for ``min_idle_s``.
        """
        self._is_draining = True
        self._training.end_all(_shutting_down())
        while self._detached.free_oldest():
            pass
        for (peer, session_id), waiting in list(self._waiting.items()):
            waiting.timer.cancel()
            del self._waiting[peer, session_id]
            peer.refuse(session_id, _shutting_down())
        deadline = time.monotonic() + timeout_s
        while self._sessions and time.monotonic() < deadline:
            await asyncio.sleep(min(LOOK_AGAIN_S, timeout_s))
            while self._evict_idle():
                pass
        if self._sessions and timeout_s:
            logger.warning("%d sessions go on no more: the time is over", len(self._sessions))

    # Sessions

    def ask_for_room(self, peer: CloudPeer, message: OpenSession) -> None:
        """Admit a session now or when there is room. Raises RequestError or CapacityError.

        One that is to be resumed gives up its place on the connection that it is still on.
        """
        if self._is_draining:
            raise _shutting_down()
        limits = self.limits
        if message.training:
            self._training.require(message)
        elif not 0 < message.max_positions <= limits.max_positions:
            raise RequestError(
                f"a sequence of {message.max_positions} positions is not possible; this cloud "
                f"offers up to {limits.max_positions}"
            )
        if message.resume is not None:
            session = self._resumable.get(digest(message.resume))
            if session is not None and session.peer.client == peer.client:
                session.peer.lose(session.session_id)
        num_waiting = sum(waiting.peer.client == peer.client for waiting in self._waiting.values())
        self.accounts.require_session(peer.client, num_waiting)
        if not self._waiting and len(self._sessions) < limits.max_sessions:
            peer.admit(message)
        elif len(self._waiting) < limits.max_waiting:
            self._wait(peer, message, time.monotonic() + limits.max_wait_s)
        else:
            raise self._full()

    def open_session(self, peer: CloudPeer, message: OpenSession) -> tuple[Session, str | None]:
        """Make a session for which there is room, with the cache that it is to be resumed with.

        Returns it with the token by which it can be resumed in turn.
        """
        training = None
        if message.training:
            training = self._training.open(message, peer)
        kv, num_positions = self._cache_for(peer, message)
        session = Session(
            number=next(self._numbers),
            session_id=message.session_id,
            peer=peer,
            kv=kv,
            hidden_codec=message.hidden_codec,
            exchange_codec=message.exchange_codec,
            num_positions=num_positions,
            training=training,
        )
        token = None
        if self.limits.resume_timeout_s and training is None:
            token = new_resume_token()
            session.token_digest = digest(token)
            self._resumable[session.token_digest] = session
        self._sessions[session.number] = session
        self.accounts.open(peer.client, session.number, session.kv)
        self.metrics.sessions_opened += 1
        self.runner.open(session.number, peer.client)
        return session, token

    def _cache_for(self, peer: CloudPeer, message: OpenSession) -> tuple[KVCache, int]:
        """The cache a session begins with, and how many positions are in it."""
        if message.resume is not None:
            detached = self._detached.take(message.resume, peer.client)
            if detached is not None:
                if detached.kv.capacity == message.max_positions:
                    self.metrics.sessions_resumed += 1
                    return detached.kv, detached.num_positions
                detached.kv.release()
        return self._pool.open(1 if message.training else message.max_positions), 0

    def close_session(self, session: Session, *, may_return: bool = False) -> None:
        """End a session and let in whoever waits.

        ``may_return``: its cache is kept for a while, as far as its steps have ended.
        """
        del self._sessions[session.number]
        self.accounts.close(session.peer.client, session.number)
        self.runner.close(session.number, session.steps)
        if session.training is not None:
            session.training.close()
        if session.token_digest is not None:
            del self._resumable[session.token_digest]
        num_positions = min(
            [step.context.position for step in session.steps.values()],
            default=session.num_positions,
        )
        if may_return and num_positions and session.token_digest and not self._is_draining:
            client = session.peer.client
            self._detached.keep(session.token_digest, Detached(client, session.kv, num_positions))
        else:
            session.kv.release()
        self._admit_next()

    def note_used(self, session: Session, num_positions: int) -> None:
        """A step of this session has ended."""
        self.metrics.positions += num_positions
        session.last_used = time.monotonic()
        self._sessions.move_to_end(session.number)

    def make_room(self, session: Session, position: int, num_positions: int) -> None:
        """Reserve memory for a step. Raises RequestError, or CapacityError if there is none.

        What a client lacks of its own share comes from its own idle sessions, what the cloud lacks
        from anybody's.
        """
        kv, accounts, client = session.kv, self.accounts, session.peer.client
        kv.check_room(position, num_positions)
        if position < session.num_positions:
            kv.truncate(position)
        share = partial(accounts.require_room, client, session.number, position, num_positions)
        self._evicting(share, session, client)
        spare = accounts.num_free_blocks(client, self._pool)
        self._evicting(partial(kv.reserve, position, num_positions, spare), session)

    def withdraw(self, peer: CloudPeer, session_id: int) -> None:
        """A session that still waits is not wanted any more."""
        waiting = self._waiting.pop((peer, session_id), None)
        if waiting is not None:
            waiting.timer.cancel()

    def withdraw_all(self, peer: CloudPeer) -> None:
        """Nor is any other of this edge."""
        for waiting_peer, session_id in list(self._waiting):
            if waiting_peer is peer:
                self.withdraw(peer, session_id)

    def _admit_next(self) -> None:
        while self._waiting and len(self._sessions) < self.limits.max_sessions:
            (peer, session_id), waiting = next(iter(self._waiting.items()))
            self.withdraw(peer, session_id)
            peer.admit(waiting.message)

    def _wait(self, peer: CloudPeer, message: OpenSession, deadline: float) -> None:
        """Let a session wait for room, until somebody closes one or falls idle."""
        key = peer, message.session_id
        look_again = partial(self._look_again, key, deadline)
        delay_s = min(self.limits.min_idle_s, max(0.0, deadline - time.monotonic()))
        timer = asyncio.get_running_loop().call_later(delay_s, look_again)
        self._waiting[key] = _Waiting(peer, message, timer)
        self._evict_idle()  # which lets in the first that waits

    def _look_again(self, key: tuple[CloudPeer, int], deadline: float) -> None:
        peer, session_id = key
        message = self._waiting[key].message
        if time.monotonic() < deadline:
            self._wait(peer, message, deadline)
            return
        self._evict_idle()
        if self._waiting.pop(key, None) is not None:
            peer.refuse(session_id, self._full())

    @property
    def is_draining(self) -> bool:
        """Whether it lets nobody in any more."""
        return self._is_draining

    def _occupancy(self) -> Occupancy:
        pool = self._pool
        return Occupancy(
            self.connections.num_clients,
            len(self._sessions),
            len(self._detached),
            len(self._waiting),
            pool.num_used_blocks,
            pool.num_blocks,
        )

    def _full(self) -> CapacityError:
        return CapacityError(
            f"this cloud serves {len(self._sessions)} sessions already and {len(self._waiting)} "
            f"wait; try again in {self.limits.max_wait_s:.0f} s",
            self.limits.max_wait_s,
        )

    def _evicting(
        self, attempt: Callable[[], None], besides: Session, client: str | None = None
    ) -> None:
        """Make an attempt until it succeeds or there is nobody left to evict."""
        while True:
            try:
                attempt()
                return
            except CapacityError as error:
                if client is None and self._detached.free_oldest():
                    continue
                if not self._evict_idle(besides, client):
                    error.retry_after_s = self.limits.min_idle_s
                    raise

    def _evict_idle(self, besides: Session | None = None, client: str | None = None) -> bool:
        """Take the memory of the session that was idle for longest; False if none is idle.

        ``client``: of this one's sessions only.
        """
        latest = time.monotonic() - self.limits.min_idle_s
        for session in self._sessions.values():
            if session.last_used > latest:
                return False
            is_meant = client is None or session.peer.client == client
            is_idle = not session.steps and session.training is None  # which has no cache
            if is_meant and session is not besides and is_idle:
                self.metrics.sessions_evicted += 1
                session.peer.fail(
                    session.session_id,
                    SessionEvicted("this session was idle and its cache was needed elsewhere"),
                )
                return True
        return False


def _shutting_down() -> CloudDraining:
    return CloudDraining("this cloud is shutting down; try again later")
