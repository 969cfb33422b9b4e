"""One direction of an emulated network: when each frame comes out of it, and in what shape.

No I/O, no event loop and no clock: time is an argument, in seconds of one monotonic clock.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass

from privatelora.errors import ConfigError

MIN_BANDWIDTH_MBPS = 0.001
MAX_DELAY_MS = 3_600_000.0

_MIN_WINDOW_NBYTES = 64 * 1024
_MAX_WINDOW_NBYTES = 64 * 2**20
_UNLIMITED_WINDOW_NBYTES = 16 * 2**20
_BACKLOG_S = 0.05
"""How much the link has in stock to carry while a busy program does not look after it."""

FRAME_OVERHEAD_NBYTES = 256
"""Charged to the window per frame, about what its Python objects take."""

_MAX_FLIPPED_BITS = 4


@dataclass(frozen=True)
class Impairment:
    """What one direction of a network does to the frames in it; the default is nothing.

    ``bandwidth_mbps``: 10^6 bits of frame payload per second; None is unlimited. ``delay_ms``:
    one way, from the last bit on the link to the arrival. ``jitter_ms``: each frame's delay is
    uniform in ``delay_ms`` ± this, but frames never overtake each other: in dense traffic they
    wait for the slowest.

    With these probabilities, each frame on its own: ``stall_probability``, the link stands still
    for ``stall_ms`` before the frame; ``truncate_probability``, the frame loses a random tail,
    one byte up to all; ``corrupt_probability``, one to four random bits flip;
    ``drop_probability``, the link is lost where the frame would have arrived. (A reliable
    transport repeats what a network loses: a lost packet shows as a stall.)

    Raises ConfigError for a value that cannot work.
    """

    bandwidth_mbps: float | None = None
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    stall_probability: float = 0.0
    stall_ms: float = 0.0
    truncate_probability: float = 0.0
    corrupt_probability: float = 0.0
    drop_probability: float = 0.0

    def __post_init__(self) -> None:
        mbps = self.bandwidth_mbps
        if mbps is not None and not (MIN_BANDWIDTH_MBPS <= mbps < math.inf):
            raise ConfigError(
                f"bandwidth_mbps must be at least {MIN_BANDWIDTH_MBPS}, or unset for no limit, "
                f"not {mbps}"
            )
        for name, value in vars(self).items():
            if name.endswith("_ms") and not 0 <= value <= MAX_DELAY_MS:
                raise ConfigError(f"{name} must be from 0 to {MAX_DELAY_MS:.0f}, not {value}")
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, not {value}")
        if self.jitter_ms > self.delay_ms:
            raise ConfigError(
                f"jitter_ms ({self.jitter_ms}) must not exceed delay_ms ({self.delay_ms}): "
                "no frame arrives before it was sent"
            )
        if (self.stall_probability > 0) != (self.stall_ms > 0):
            raise ConfigError("stall_probability and stall_ms only work together; set both")


@dataclass(frozen=True, slots=True)
class Passage:
    """A frame on its way over the link, or the end of the direction (``frame`` is None).

    ``frame``: as it will arrive. ``number``: 1 for the first frame. ``arrival``: when, in
    seconds. ``duration``: how long its bits take, in seconds. ``held_nbytes``: what it takes of
    the window. ``lost``: the link is lost at ``arrival``. ``faults``: what was done to it, for
    people.
    """

    frame: memoryview | None
    number: int
    arrival: float
    duration: float
    held_nbytes: int
    lost: bool = False
    faults: str = ""


class Link:
    """The timeline of one direction, and the frames that are on it.

    Frames are serialised one after the other at the bandwidth and arrive the delay later. Times
    are computed from the ideal times of the frame before, so a program that looks too late does
    not slow a busy link down. Each frame takes a fixed number of draws from a random stream of
    its own direction: the faults of the n-th frame depend on ``seed`` and n, never on timing or
    on which other impairments are set.

    ``window_nbytes``: what may be on the link, as the window of a transport protocol would allow:
    twice what it carries in its delay, and 50 ms more; at least 64 KiB, at most 64 MiB, 16 MiB
    without a bandwidth. Each frame counts 256 bytes more than it has, so that frames much
    smaller than this may be held back by the window rather than by the bandwidth.
    """

    def __init__(self, impairment: Impairment, seed: str) -> None:
        self.window_nbytes = _window_nbytes(impairment)
        self._impairment = impairment
        self._random = random.Random(seed)
        self._passages: deque[Passage] = deque()
        self._held_nbytes = 0
        self._num_frames = 0
        self._free_at = -math.inf
        self._last_arrival = -math.inf

    @property
    def head(self) -> Passage | None:
        """What arrives next."""
        return self._passages[0] if self._passages else None

    def schedule(self, frame: memoryview, ready: float) -> Passage:
        """The passage of the next frame, whose sender had it ready at ``ready``.

        The frame is on the link only after ``enter``. A damaged frame is a copy.
        """
        made, chance = self._impairment, self._random.random
        lost = chance() < made.drop_probability
        stalled = chance() < made.stall_probability
        truncated = chance() < made.truncate_probability and len(frame) > 0
        corrupted = chance() < made.corrupt_probability and len(frame) > 0
        jitter_ms = made.jitter_ms * (2 * chance() - 1)
        kept, bits_seed = chance(), self._random.getrandbits(64)

        nbytes = len(frame)
        duration = 0.0
        if made.bandwidth_mbps is not None:
            duration = nbytes * 8 / (made.bandwidth_mbps * 1e6)
        faults = []
        if stalled:
            faults.append(f"stalled for {made.stall_ms} ms")
        if truncated:
            frame = memoryview(bytearray(frame[: int(kept * nbytes)]))
            faults.append(f"truncated from {nbytes} to {len(frame)} bytes")
        if corrupted and len(frame) > 0:
            frame, num_flipped = _with_flipped_bits(frame, bits_seed)
            faults.append(f"{num_flipped} bits flipped")

        self._num_frames += 1
        self._free_at = max(self._free_at, ready) + stalled * made.stall_ms / 1e3 + duration
        arrival = self._arrive(made.delay_ms + jitter_ms)
        held_nbytes = nbytes + FRAME_OVERHEAD_NBYTES
        return Passage(
            frame, self._num_frames, arrival, duration, held_nbytes, lost, ", ".join(faults)
        )

    def schedule_end(self, now: float) -> Passage:
        """The passage of the end of this direction, which is no frame and suffers no fault."""
        self._free_at = max(self._free_at, now)
        arrival = self._arrive(self._impairment.delay_ms)
        return Passage(None, self._num_frames, arrival, 0.0, FRAME_OVERHEAD_NBYTES)

    def _arrive(self, delay_ms: float) -> float:
        self._last_arrival = max(self._last_arrival, self._free_at + delay_ms / 1e3)
        return self._last_arrival

    def enter(self, passage: Passage) -> None:
        """Put a passage on the link, in the order they were scheduled."""
        self._passages.append(passage)
        self._held_nbytes += passage.held_nbytes

    def leave(self) -> None:
        """Take the head off the link; there must be one."""
        self._held_nbytes -= self._passages.popleft().held_nbytes

    def clear(self) -> None:
        """Forget everything on the link."""
        self._passages.clear()
        self._held_nbytes = 0

    def time_of_holding(self, nbytes: int, now: float) -> float:
        """From when on no more than ``nbytes`` are on the link; inf: not before the head left.

        A frame leaves the window bit by bit while it arrives, so that a frame above the window
        does not interrupt the stream; one that is due and not taken off counts in full.
        """
        surplus_nbytes = self._held_nbytes - nbytes
        if surplus_nbytes <= 0:
            return now
        head = self._passages[0]
        if now >= head.arrival or surplus_nbytes > head.held_nbytes:
            return math.inf
        return head.arrival - head.duration * (1 - surplus_nbytes / head.held_nbytes)


def _window_nbytes(impairment: Impairment) -> int:
    if impairment.bandwidth_mbps is None:
        return _UNLIMITED_WINDOW_NBYTES
    delay_s = (impairment.delay_ms + impairment.jitter_ms) / 1e3
    nbytes = impairment.bandwidth_mbps * 1e6 / 8 * (2 * delay_s + _BACKLOG_S)
    return int(min(max(nbytes, _MIN_WINDOW_NBYTES), _MAX_WINDOW_NBYTES))


def _with_flipped_bits(frame: memoryview, seed: int) -> tuple[memoryview, int]:
    """A copy of ``frame`` (not empty) with one to four bits flipped, and how many."""
    chooser = random.Random(seed)
    flipped = bytearray(frame)
    bits = chooser.sample(range(8 * len(flipped)), chooser.randint(1, _MAX_FLIPPED_BITS))
    for bit in bits:
        flipped[bit // 8] ^= 1 << bit % 8
    return memoryview(flipped), len(bits)
