"""Frame i of seed s: what is sent to whom.

Every ``EPISODE`` frames the ends are made anew, so that what a frame meets can be made again
without all the frames before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import NamedTuple

from tests.fuzz.conversations import Event, Recording
from tests.fuzz.end import End, Tally
from tests.fuzz.mutations import below, mutate, pick, spoil_stream
from tests.fuzz.recordings import recordings, streamed

EPISODE = 128
"""Frames that meet the same ends, as far as those survive."""
NUM_TARGETS = 8
"""Ends in an episode."""


@dataclass(frozen=True, slots=True)
class Target:
    """An end in the state after the first ``position`` events, about to hear something."""

    recording: Recording
    position: int

    @property
    def coming(self) -> tuple[Event, ...]:
        """What it is about to hear in the recording."""
        return tuple(event for event in self.recording.events[self.position :] if event.heard)

    def end(self, tally: Tally) -> End:
        """A new end in this state."""
        end = End(self.recording.role, tally)
        for event in self.recording.events[: self.position]:
            if event.heard:
                end.recall(event.frame)
            elif event.message is not None:
                end.say(event.message)
        return end


@cache
def targets() -> tuple[Target, ...]:
    """Every state of every recording in which something is heard, and those at their ends."""
    return tuple(
        Target(recording, position)
        for recording in recordings()
        for position, event in enumerate((*recording.events, None))
        if event is None or event.heard
    )


@cache
def _frames() -> tuple[bytes, ...]:
    # Each once, in an order that is the same in every process.
    frames = (event.frame for recording in recordings() for event in recording.heard)
    return tuple(dict.fromkeys(frames))


class Case(NamedTuple):
    """Bytes for one end.

    ``slot``: which end of the episode. ``is_intact``: the bytes are those that were recorded
    next. ``is_kept`` and ``says_goodbye``: what the end does after a breach.
    """

    slot: int
    pieces: tuple[bytes, ...]
    is_intact: bool
    is_kept: bool
    says_goodbye: bool


def episode_targets(seed: int, index: int) -> tuple[Target, ...]:
    """The ends that frame ``index`` and its neighbours go to."""
    rng = _random(seed, 1, index // EPISODE)
    return tuple(pick(rng, targets()) for _ in range(NUM_TARGETS))


def make_case(seed: int, index: int, ends: tuple[Target, ...]) -> Case:
    """Frame ``index`` of ``seed``, for one of ``ends``, which are those of its episode."""
    rng = _random(seed, 0, index)
    slot = below(rng, len(ends))
    coming, frames = ends[slot].coming, _frames()
    which = rng.random()
    if coming and which < 0.75:
        frame = coming[0].frame if which < 0.6 else pick(rng, coming).frame
    else:
        frame = pick(rng, frames)
    is_spoilt = rng.random() < 0.9
    if is_spoilt:
        frame = mutate(rng, frame, pick(rng, frames))
    stream = streamed(frame)
    if rng.random() < 0.1:
        is_spoilt = True
        stream = spoil_stream(rng, stream, pick(rng, frames))
    return Case(
        slot,
        _cut(rng, stream),
        not is_spoilt and bool(coming) and which < 0.6,
        rng.random() < 0.2,
        rng.random() < 0.5,
    )


def _cut(rng: Random, stream: bytes) -> tuple[bytes, ...]:
    way = rng.random()
    if way < 0.7:
        return (stream,)
    cuts = sorted(below(rng, len(stream) + 1) for _ in range(1 if way < 0.9 else below(rng, 9)))
    return tuple(
        stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    )


def _random(seed: int, purpose: int, index: int) -> Random:
    return Random(seed << 66 | purpose << 65 | index)
