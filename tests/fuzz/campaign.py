"""Many spoilt frames against ends in every state, and what must hold for each of them."""

from __future__ import annotations

import gc
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import thread_time_ns

from privatelora.errors import ProtocolError, RemoteProtocolError, VersionMismatch
from privatelora.runtime.wire.codec import decode, encode
from privatelora.runtime.wire.control import MAGIC
from privatelora.runtime.wire.messages import (
    PROTOCOL_VERSION,
    BackwardBegin,
    BackwardEnd,
    ErrorCode,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    Hello,
    Message,
    StepBegin,
    StepEnd,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import TYPES
from privatelora.runtime.wire.rules import Phase
from tests.fuzz.cases import EPISODE, Case, Target, episode_targets, make_case
from tests.fuzz.end import LIMITS, End, Tally

MAX_FRAME_US = 10_000.0
"""A frame that keeps an end busy for longer, whenever it is tried, is a finding. Time of this
thread: others may have the processor for as long as they like."""
MAX_GROWTH_NBYTES = 32 * 2**20
"""So is a process that grows by more."""
WARM_UP_FRAMES = 2_000
"""From then on growth is measured."""

_NUM_REPEATS = 3
_MAX_REASON_CHARS = 400
_STEP_MESSAGES = (
    *(StepBegin, ExchangeRequest, ExchangeReply, StepEnd),
    *(TrainBegin, BackwardBegin, GradientRequest, GradientReply, BackwardEnd),
)
_RECOGNISABLE = (TYPES[Hello], TYPES[ErrorReply])


@contextmanager
def garbage_apart() -> Iterator[None]:
    """Around a campaign: garbage is collected between episodes only, and little is looked at.

    So it does not slow down single frames, and what grows is no garbage.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Finding(Exception):
    """Something that must not happen, and what is needed to make it happen again."""

    def __init__(self, what: str, seed: int, index: int, target: Target, case: Case) -> None:
        recording = target.recording
        before = [type(event.message).__name__ for event in recording.events[: target.position]]
        super().__init__(
            f"{what}\n"
            f"frame {index} of seed {seed}, to a new {recording.role} after "
            f"{', '.join(before) or 'nothing'}, or what frames of this episode made of it\n"
            f"again: python -m tests.fuzz --seed {seed} --start {index} --frames 1\n"
            f"bytes as they arrive: {' '.join(piece.hex() for piece in case.pieces)}"
        )


class Campaign:
    """Tries the frames of one seed, one after the other.

    Needs a running event loop and ``garbage_apart``.

    ``outcomes`` counts frames as they were sent. Each may arrive as none, one or two; those are
    in ``tally``. ``slowest``: microseconds of the slowest frame, the fastest of some tries, and
    which it was. ``growth_nbytes``: by how much the process has grown.
    """

    def __init__(self, seed: int, start: int = 0) -> None:
        """Begin with frame ``start`` or the first of its episode, to which it belongs."""
        self.seed = seed
        self.tally = Tally()
        self.outcomes: Counter[str] = Counter()
        self.slowest = (0.0, start)
        self.growth_nbytes = 0
        self._index = start - start % EPISODE
        self._targets: tuple[Target, ...] = ()
        self._ends: dict[int, End] = {}
        self._first_rss_nbytes: int | None = None

    @property
    def num_frames(self) -> int:
        """Frames tried so far."""
        return self.outcomes.total()

    def run(self, stop: int) -> None:
        """Go on to frame ``stop - 1``. Raises Finding."""
        for index in range(self._index, stop):
            duration_us = self._try(index)
            if duration_us > self.slowest[0]:
                self._watch_time(duration_us, index)
            self._watch_memory(index)
        self._index = max(stop, self._index)

    def _reach(self, index: int) -> float:
        """Try all frames up to ``index``; time in microseconds that this one took."""
        for earlier in range(self._index, index):
            self._try(earlier)
        return self._try(index)

    def _try(self, index: int) -> float:
        if index % EPISODE == 0:
            self._targets = episode_targets(self.seed, index)
            self._ends.clear()
            gc.collect()
        case = make_case(self.seed, index, self._targets)
        target = self._targets[case.slot]
        end = self._ends.get(case.slot)
        is_new = end is None
        had_ended = end is not None and end.wire.phase is Phase.ENDED
        if end is None:
            end = self._ends[case.slot] = target.end(self.tally)
        try:
            duration_us, error = _send(case, end)
            if case.is_intact and is_new:
                heard = [message for _, message in end.heard]
                assert heard == [target.coming[0].message], "a good frame was refused"
            self.outcomes[_outcome(end, error)] += 1
            is_over = had_ended or end.in_frame or end.stream_is_broken
            if is_over or (error is not None and not case.is_kept):
                del self._ends[case.slot]
            elif error is not None and case.says_goodbye and end.wire.phase is not Phase.ENDED:
                end.say(ErrorReply(ErrorCode.PROTOCOL, str(error)))
        except Exception as other:  # whatever it is, it is a finding
            raise self._finding(f"{type(other).__name__}: {other}", index) from other
        return duration_us

    def _watch_time(self, duration_us: float, index: int) -> None:
        """Try a frame that was slow again, because other programs may have been busy."""
        slowest_us, _ = self.slowest
        for _ in range(_NUM_REPEATS):
            duration_us = min(duration_us, Campaign(self.seed, index)._reach(index))
            if duration_us <= slowest_us:
                return
        self.slowest = duration_us, index
        if duration_us > MAX_FRAME_US:
            raise self._finding(f"a frame took {duration_us:.0f} us", index)

    def _watch_memory(self, index: int) -> None:
        if self.num_frames < WARM_UP_FRAMES:
            return
        rss_nbytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._first_rss_nbytes is None:
            self._first_rss_nbytes = rss_nbytes
        self.growth_nbytes = rss_nbytes - self._first_rss_nbytes
        if self.growth_nbytes > MAX_GROWTH_NBYTES:
            raise self._finding(f"memory has grown by {self.growth_nbytes} bytes", index)

    def _finding(self, what: str, index: int) -> Finding:
        case = make_case(self.seed, index, self._targets)
        return Finding(what, self.seed, index, self._targets[case.slot], case)


def _send(case: Case, end: End) -> tuple[float, ProtocolError | None]:
    """Feed the bytes, check what became of them; microseconds, and the error if there was one."""
    end.heard.clear()
    phase = end.wire.phase
    error: ProtocolError | None = None
    start_ns = thread_time_ns()
    try:
        for piece in case.pieces:
            end.feed(piece)
    except (RemoteProtocolError, VersionMismatch) as caught:
        error = caught.with_traceback(None)  # which would keep this frame alive, in a cycle
    duration_us = (thread_time_ns() - start_ns) / 1000
    for frame, message in end.heard:
        check_message(frame, message)
    if error is not None:
        check_error(error)
        if phase < Phase.BROKEN and end.wire.phase is Phase.BROKEN:
            is_mismatch = isinstance(error, VersionMismatch)
            assert is_mismatch == _speaks_another_version(end.last_frame), "whose version differs?"
    return duration_us, error


def check_message(frame: memoryview, message: Message | None) -> None:
    """What was read says what the frame says: written again it is the same."""
    if message is None:
        return
    again = b"".join(encode(message))
    if isinstance(message, _STEP_MESSAGES):
        assert again == frame, "there is more than one way to write this"
    else:
        assert decode(memoryview(again), LIMITS) == message, "written again it says something else"


def check_error(error: ProtocolError) -> None:
    """It can be shown to a person."""
    reason = str(error)
    assert 0 < len(reason) <= _MAX_REASON_CHARS, f"a reason of {len(reason)} characters"
    assert reason.isprintable(), "a reason with control characters"


def _speaks_another_version(frame: memoryview) -> bool:
    version = int.from_bytes(frame[2:4], "little")
    return (
        len(frame) >= 16
        and frame[0] in _RECOGNISABLE
        and frame[8:16] == MAGIC
        and version != PROTOCOL_VERSION
    )


def _outcome(end: End, error: ProtocolError | None) -> str:
    if error is not None:
        return "stream refused" if end.stream_is_broken else type(error).__name__
    if end.in_frame:
        return "cut off"
    return "late" if all(message is None for _, message in end.heard) else "message"
