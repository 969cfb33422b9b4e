"""Waiting until a moment to within tens of microseconds.

The timers of event loops are coarse: asyncio rounds up to the next millisecond when it sleeps,
uvloop rounds to whole milliseconds. A Linux timerfd is a descriptor that becomes readable on
time, and a loop reacts to it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import heapq
import itertools
import logging
import math
import os
from time import CLOCK_MONOTONIC, monotonic
from typing import Protocol

from privatelora.transports.flow import wake

_logger = logging.getLogger("privatelora.transports")

_ABSOLUTE = 1
"""TFD_TIMER_ABSTIME, from <linux/timerfd.h>."""


class Timer(Protocol):
    """A clock that can wake."""

    def now(self) -> float:
        """The time in seconds; only differences mean something."""

    def wake_at(self, when: float, waiter: asyncio.Future[None]) -> None:
        """Resolve ``waiter`` at the time ``when``, unless it is done by then."""

    def close(self) -> None:
        """Wake nobody any more and free what is held. May be repeated."""


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class _TimerFd:
    """A timerfd on the monotonic clock; OSError or AttributeError where there is none.

    Through ctypes, as the os module has these calls only from Python 3.13 on.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        # On Linux TFD_NONBLOCK and TFD_CLOEXEC are these two.
        fd = libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.fd: int = fd

    def set(self, when: float) -> None:
        """Become readable at ``when``."""
        seconds, nanoseconds = divmod(math.ceil(when * 1e9), 10**9)
        value = _Itimerspec(it_value=_Timespec(seconds, nanoseconds))
        self._settime(self.fd, _ABSOLUTE, ctypes.byref(value), None)

    def clear(self) -> None:
        """Be readable no longer."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 8)

    def close(self) -> None:
        """Free the descriptor."""
        os.close(self.fd)


class PreciseTimer:
    """The Timer of the running loop, on ``time.monotonic``.

    Where there is no timerfd (another system than Linux, no descriptor left) it uses the loop's
    own timers, so that a wait may end a millisecond or two late, and logs a warning.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waits: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._armed_for = math.inf
        self._handle: asyncio.TimerHandle | None = None
        self._timer_fd: _TimerFd | None = None
        try:
            self._timer_fd = _TimerFd()
        except (OSError, AttributeError, TypeError) as error:
            _logger.warning("timers are only accurate to about 2 ms: no timerfd here (%s)", error)
        else:
            self._loop.add_reader(self._timer_fd.fd, self._expired)

    def now(self) -> float:
        """The time in seconds; see Timer.now."""
        return monotonic()

    def wake_at(self, when: float, waiter: asyncio.Future[None]) -> None:
        """Resolve ``waiter`` at ``when``; see Timer.wake_at."""
        heapq.heappush(self._waits, (when, next(self._numbers), waiter))
        if when < self._armed_for:
            self._arm(when)

    def close(self) -> None:
        """Wake nobody any more; see Timer.close."""
        self._waits.clear()
        if self._handle is not None:
            self._handle.cancel()
        if self._timer_fd is not None:
            self._loop.remove_reader(self._timer_fd.fd)
            self._timer_fd.close()
            self._timer_fd = None

    def _arm(self, when: float) -> None:
        self._armed_for = when
        if self._timer_fd is not None:
            self._timer_fd.set(when)
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_later(when - monotonic(), self._expired)

    def _expired(self) -> None:
        if self._timer_fd is not None:
            self._timer_fd.clear()
        self._armed_for = math.inf
        now = monotonic()
        # A waiter that something else woke costs no further wake-up.
        while self._waits and (self._waits[0][0] <= now or self._waits[0][2].done()):
            wake(heapq.heappop(self._waits)[2])
        if self._waits:
            self._arm(self._waits[0][0])
