"""What each client has on a cloud, and that it keeps to what one client may have.

A client is whom ``client_tokens.identify`` takes an edge for: one person or machine, with any
number of connections. What is over its limit is refused or waits, whatever room there is for
others; what a client lacks at its own limit is never taken from another.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from privatelora.errors import CapacityError
from privatelora.runtime.kv_cache import KVCache, KVPool
from privatelora.runtime.rate_limit import RateLimit


@dataclass(frozen=True)
class ClientLimits:
    """What one client may have at most. None: whatever there is.

    ``max_sessions``: open or waiting. ``max_positions``: of the KV cache, in all its sessions.
    ``max_steps_per_s``: steps that begin; those beyond it begin later.
    """

    max_sessions: int
    max_positions: int | None = None
    max_steps_per_s: float | None = None


class _Pacer:
    """Begins a client's steps in the order they came, no faster than its rate."""

    def __init__(self, rate: RateLimit) -> None:
        self._rate = rate
        self._held: deque[tuple[int, Callable[[], None]]] = deque()
        """Steps that may not begin yet: session and how to begin."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, session: int, begin: Callable[[], None]) -> None:
        """Call ``begin``, now or later."""
        self._held.append((session, begin))
        if self._timer is None:
            self._go_on()

    def forget(self, session: int) -> None:
        """What is held of a session never begins."""
        self._held = deque(held for held in self._held if held[0] != session)
        if not self._held and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def is_unused(self, now: float) -> bool:
        """Whether a new one would do the same."""
        return not self._held and self._rate.is_unused(now)

    def _go_on(self) -> None:
        self._timer = None
        while self._held:
            now = time.monotonic()
            delay_s = self._rate.delay(now)
            if delay_s > 0:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(delay_s, self._go_on)
                return
            self._rate.take(now)
            _, begin = self._held.popleft()
            begin()  # which may end in ``forget``, if the step fails at once


class _Account:
    def __init__(self, max_steps_per_s: float | None) -> None:
        self.caches: dict[int, KVCache] = {}
        """Of its sessions, by number."""
        self.pacer = None if max_steps_per_s is None else _Pacer(RateLimit(max_steps_per_s))

    @property
    def num_blocks(self) -> int:
        return sum([cache.num_blocks for cache in self.caches.values()])

    def is_over(self, now: float) -> bool:
        """Whether forgetting it makes no difference."""
        return not self.caches and (self.pacer is None or self.pacer.is_unused(now))


class ClientAccounts:
    """The accounts of all clients of one cloud. Sessions have numbers of the caller's choice."""

    def __init__(self, limits: ClientLimits) -> None:
        self._limits = limits
        self._accounts: dict[str, _Account] = {}

    def require_session(self, client: str, num_waiting: int) -> None:
        """Raise CapacityError if a client with ``num_waiting`` at the door may have no more."""
        account = self._accounts.get(client)
        num_open = 0 if account is None else len(account.caches)
        if num_open + num_waiting >= self._limits.max_sessions:
            raise CapacityError(
                f"{client} has {self._limits.max_sessions} sessions already; close one first"
            )

    def open(self, client: str, session: int, cache: KVCache) -> None:
        """A session begins, which keeps its positions in ``cache``."""
        if client not in self._accounts:
            self._forget_those_over()
            self._accounts[client] = _Account(self._limits.max_steps_per_s)
        self._accounts[client].caches[session] = cache

    def close(self, client: str, session: int) -> None:
        """A session ends; steps of it that have not begun never do."""
        account = self._accounts[client]
        del account.caches[session]
        if account.pacer is not None:
            account.pacer.forget(session)
        if account.is_over(time.monotonic()):  # else it may still have to be slowed down
            del self._accounts[client]

    def require_room(self, client: str, session: int, position: int, num_positions: int) -> None:
        """Raise CapacityError if a step of a session needs more blocks than its client may have."""
        most, account = self._limits.max_positions, self._accounts[client]
        if most is None:
            return
        cache = account.caches[session]
        wanted = cache.blocks_wanted(position, num_positions)
        if wanted and wanted > self.num_free_blocks(client, cache.pool):
            block_size = cache.pool.block_size
            raise CapacityError(
                f"{client} may have {most} cached positions, holds "
                f"{account.num_blocks * block_size} and needs {wanted * block_size} more; close a "
                "session, or let one be idle"
            )

    def num_free_blocks(self, client: str, pool: KVPool) -> int:
        """Blocks of ``pool`` that a client may still take, as far as its own limit goes."""
        most = self._limits.max_positions
        if most is None:
            return pool.num_blocks
        return max(0, pool.blocks_for(most) - self._accounts[client].num_blocks)

    def begin(self, client: str, session: int, begin: Callable[[], None]) -> None:
        """Begin a step by calling ``begin``, now or as soon as its client's rate allows."""
        pacer = self._accounts[client].pacer
        if pacer is None:
            begin()
        else:
            pacer.begin(session, begin)

    def _forget_those_over(self) -> None:
        now = time.monotonic()
        for client in [name for name, account in self._accounts.items() if account.is_over(now)]:
            del self._accounts[client]
