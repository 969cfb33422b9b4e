"""Flow control that every transport needs: a bounded queue of frames, and turns for senders."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic

from privatelora.errors import LocalProtocolError, PrivateLoRAError

_FRAME_OVERHEAD_NBYTES = 256
"""Charged per queued frame, about what its Python objects take: a flood of empty frames must
fill a queue too."""

_MAX_SPINS_LEFT_OUT = 1024


def again(error: PrivateLoRAError) -> PrivateLoRAError:
    """A fresh copy of ``error``: one instance raised in several tasks would mix tracebacks."""
    copy = type(error)(*error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy


def wake(waiter: asyncio.Future[None] | None) -> None:
    """Resolve ``waiter`` unless it is already resolved or cancelled."""
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class FrameQueue:
    """Frames received and not yet taken, for one receiver.

    ``frames`` and ``error`` may be read from outside: while frames is empty and error None,
    nothing is known and the receiver has to wait. ``full`` asks whoever fills the queue to
    stop; ``on_room`` is called when that is over. One frame always fits.
    """

    __slots__ = (
        "_loop",
        "_max_nbytes",
        "_nbytes",
        "_on_room",
        "_waiter",
        "error",
        "frames",
        "full",
    )

    def __init__(self, max_nbytes: int, on_room: Callable[[], None]) -> None:
        self.frames: deque[memoryview] = deque()
        self.error: PrivateLoRAError | None = None
        self.full = False
        self._max_nbytes = max_nbytes
        self._nbytes = 0
        self._on_room = on_room
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    def put(self, frame: memoryview) -> None:
        """Append a frame and wake the receiver. The caller respects ``full``."""
        self.frames.append(frame)
        self._nbytes += len(frame) + _FRAME_OVERHEAD_NBYTES
        self.full = self._nbytes >= self._max_nbytes
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def pop(self) -> memoryview:
        """Take the first frame; there must be one."""
        frame = self.frames.popleft()
        self._nbytes -= len(frame) + _FRAME_OVERHEAD_NBYTES
        if self.full and self._nbytes < self._max_nbytes:
            self.full = False
            self._on_room()
        return frame

    def require_no_receiver(self) -> None:
        """Raise LocalProtocolError if a task is waiting in ``get``."""
        if self._waiter is not None:
            raise LocalProtocolError(
                "two tasks receive on one connection; let one receive and hand frames on"
            )

    async def get(self) -> memoryview:
        """Wait for a frame and take it; after the last one raise what ``end`` was given."""
        self.require_no_receiver()
        while not self.frames:
            if self.error is not None:
                raise again(self.error)
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.pop()

    def end(self, error: PrivateLoRAError) -> None:
        """No more frames will come; the receiver gets ``error`` after those queued."""
        if self.error is None:
            self.error = error
        wake(self._waiter)

    def drop(self, error: PrivateLoRAError) -> None:
        """Like ``end``, and forget the frames that are queued."""
        self.frames.clear()
        self._nbytes = 0
        self.full = False
        self.end(error)


class AdaptiveSpin:
    """Looks for a frame again and again for a bounded time, while that pays.

    Waking a process that sleeps can take longer than a near peer takes to answer. For a far
    peer looking is waste, and on a busy machine the peer may need the very core that looks:
    after a spin in vain the next one is left out, after each further one twice as many.
    """

    __slots__ = ("_num_left_out", "_num_to_leave_out", "_spin_s")

    def __init__(self, spin_s: float) -> None:
        self._spin_s = spin_s
        self._num_left_out = 0
        self._num_to_leave_out = 1

    def until(self, look: Callable[[], bool]) -> bool:
        """Call ``look`` until it is true, or the time is over or not worth spending."""
        if self._num_left_out > 0:
            self._num_left_out -= 1
            return False
        deadline = monotonic() + self._spin_s
        while not look():
            if monotonic() >= deadline:
                self._num_left_out = self._num_to_leave_out
                self._num_to_leave_out = min(2 * self._num_to_leave_out, _MAX_SPINS_LEFT_OUT)
                return False
        self._num_to_leave_out = 1
        return True


class Turns:
    """Mutual exclusion in order of arrival: ``async with turns``.

    While ``num_tasks`` (inside or waiting) is 0, code that does not await may do without,
    and so pays nothing for the exclusion.
    """

    __slots__ = ("_lock", "num_tasks")

    def __init__(self) -> None:
        self.num_tasks = 0
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        self.num_tasks += 1
        try:
            await self._lock.acquire()
        except BaseException:
            self.num_tasks -= 1
            raise

    async def __aexit__(self, *exc: object) -> None:
        self.num_tasks -= 1
        self._lock.release()
