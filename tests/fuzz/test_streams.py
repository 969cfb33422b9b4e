"""Bytes of whole conversations, through everything that a real end reads them with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privatelora.errors import ProtocolError, RemoteProtocolError, VersionMismatch
from privatelora.runtime.wire.messages import PROTOCOL_VERSION, ErrorReply, Hello, Message, Role
from privatelora.runtime.wire.prelude import TYPES
from privatelora.runtime.wire.rules import Phase, SessionPhase
from privatelora.transports.framing import HEADER, HEADER_NBYTES, MAGIC
from tests.fuzz.campaign import check_error, check_message
from tests.fuzz.cases import Target, targets
from tests.fuzz.conversations import Recording
from tests.fuzz.end import LIMITS, MAX_FRAME_NBYTES, End, Tally
from tests.fuzz.recordings import Follower, recordings, streamed

RECORDINGS = {recording.name: recording for recording in recordings() if recording.heard}
NAMES = sorted(RECORDINGS)


def every(scripts: str) -> pytest.MarkDecorator:
    """Recordings from both ends; the numbers say which codecs their tensors are in."""
    names = [name for name in NAMES if name.rpartition("-")[0] in scripts.split()]
    return pytest.mark.parametrize("recording", [RECORDINGS[n] for n in names], ids=names)


def frames_of(recording: Recording) -> list[bytes]:
    """What the end hears, cut between frames."""
    return [streamed(event.frame) for event in recording.heard]


def messages_of(recording: Recording) -> list[Message | None]:
    return [event.message for event in recording.heard]


def heard_by(end: End) -> list[Message | None]:
    return [message for _, message in end.heard]


def feed(end: End, pieces: Sequence[bytes]) -> ProtocolError | None:
    """Everything, or as far as the end listens; any other exception fails the test."""
    try:
        for piece in pieces:
            end.feed(piece)
    except (RemoteProtocolError, VersionMismatch) as error:
        check_error(error)
        return error
    finally:
        for frame, message in end.heard:
            check_message(frame, message)
    return None


async def test_recordings_lead_into_every_state() -> None:
    """So that what is tried on them meets all states."""
    phases, sessions, num_steps = set(), set(), set()
    for target in targets():
        role, wire = target.recording.role, target.end(Tally()).wire
        phases.add((role, wire.phase))
        sessions |= {(role, phase) for phase in wire.sessions.values()}
        num_steps |= {(role, len(wire.steps(session_id))) for session_id in wire.sessions}
    assert phases == {(role, phase) for role in Role for phase in Phase if phase != Phase.BROKEN}
    assert sessions == {(role, p) for role in Role for p in SessionPhase if p != SessionPhase.OVER}
    assert num_steps == {(role, n) for role in Role for n in range(LIMITS.max_steps + 1)}


@every(
    "steps-0 steps-9 crossings-5 crossings-14 prompt-0 prompt-14 gone-0 unwelcome-0 "
    "training-7 training_crossings-12"
)
async def test_cut_off_anywhere(recording: Recording) -> None:
    """Byte by byte, so that the stream has ended at every point once."""
    end, frames = Follower(recording, Tally()), frames_of(recording)
    for num_heard, frame in enumerate(frames):
        for position in range(len(frame)):
            assert len(end.heard) == num_heard
            assert end.in_frame == (position > 0)
            end.feed(frame[position : position + 1])
    assert not end.in_frame
    assert heard_by(end) == messages_of(recording)


@every("crossings-8 refused-0 rebuffed-0")
async def test_split_at_every_point(recording: Recording) -> None:
    stream = b"".join(frames_of(recording))
    for position in range(len(stream)):
        end = Follower(recording, Tally())
        end.feed(stream[:position])
        end.feed(stream[position:])
        assert heard_by(end) == messages_of(recording)
        assert not end.in_frame


@st.composite
def damaged(draw: st.DrawFn) -> tuple[Recording, list[bytes], int]:
    """A recording, its stream in pieces with some of it wrong, the number of good frames before."""
    recording = RECORDINGS[draw(st.sampled_from(NAMES))]
    good = frames_of(recording)
    frames = list(good)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(frames) - 1))
        frame = frames[at]
        match draw(st.sampled_from(["corrupt", "cut", "add", "size", "drop", "repeat", "move"])):
            case "corrupt":
                place = draw(st.integers(0, len(frame) - 1))
                byte = bytes([frame[place] ^ draw(st.integers(1, 255))])
                frames[at] = frame[:place] + byte + frame[place + 1 :]
            case "cut":
                frames[at] = frame[: draw(st.integers(1, len(frame)))]
            case "add":
                frames[at] = frame + draw(st.binary(min_size=1, max_size=20))
            case "size":
                sizes = (
                    st.integers(0, 2**32 - 1)
                    | st.integers(0, len(frame))
                    | st.just(MAX_FRAME_NBYTES)
                )
                frames[at] = HEADER.pack(MAGIC, draw(sizes)) + frame[HEADER_NBYTES:]
            case "drop" if len(frames) > 1:
                del frames[at]
            case "repeat":
                frames.insert(draw(st.integers(0, len(frames))), frame)
            case _:
                frames.insert(draw(st.integers(0, len(frames) - 1)), frames.pop(at))
    num_good = 0
    while num_good < min(len(frames), len(good)) and frames[num_good] == good[num_good]:
        num_good += 1
    stream = b"".join(frames)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    return recording, pieces, num_good


@given(damaged())
@settings(max_examples=500, deadline=None)
async def test_a_damaged_stream(damage: tuple[Recording, list[bytes], int]) -> None:
    """Frames before the damage are heard; from there on all is a message, late or an error."""
    recording, pieces, num_good = damage
    end, messages = Follower(recording, Tally()), messages_of(recording)
    error = feed(end, pieces)
    assert heard_by(end)[:num_good] == messages[:num_good]
    if b"".join(pieces) == b"".join(frames_of(recording)):
        assert error is None
        assert heard_by(end) == messages
        assert not end.in_frame


@every("steps-3 crossings-3 unwelcome-0 training_crossings-3")
@pytest.mark.parametrize("nbytes", [MAX_FRAME_NBYTES + 1, 2**32 - 1])
async def test_a_frame_too_large_anywhere(recording: Recording, nbytes: int) -> None:
    frames = frames_of(recording)
    for place in range(len(frames)):
        end = Follower(recording, Tally())
        large = HEADER.pack(MAGIC, nbytes) + bytes(1000)
        error = feed(end, [b"".join(frames[:place]) + large])
        assert str(nbytes) in str(error)
        assert heard_by(end) == messages_of(recording)[:place]


@every("steps-6 crossings-6 prompt-6 gone-0 refused-0 unwelcome-0 training-6 training_crossings-6")
async def test_nothing_is_heard_twice(recording: Recording) -> None:
    """A frame that comes again, at once or later, is refused or too late."""
    for position in range(len(recording.events) + 1):
        for earlier in recording.events[:position]:
            if earlier.heard:
                end = Target(recording, position).end(Tally())
                error = feed(end, [streamed(earlier.frame)])
                assert isinstance(error, RemoteProtocolError) or heard_by(end) == [None]


@pytest.mark.parametrize("kind", [Hello, ErrorReply])
@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, 2**16 - 1])
async def test_another_version_in_every_state(kind: type[Message], version: int) -> None:
    frame = bytes([TYPES[kind], 77]) + version.to_bytes(2, "little") + b"PrivPrivLoRA and so on"
    for target in targets()[::7]:
        end = target.end(Tally())
        has_ended = end.wire.phase is Phase.ENDED
        error = feed(end, [streamed(frame)])
        if has_ended:  # by this end, which listens no more, or by the other, which may not go on
            assert heard_by(end) == [None] or isinstance(error, RemoteProtocolError)
        else:
            assert isinstance(error, VersionMismatch)
            assert f"version {version}" in str(error)
