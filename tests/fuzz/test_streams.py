"""Bytes of whole conversations, through everything that a real end reads them with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privatelora.errors import ProtocolError, RemoteProtocolError, VersionMismatch
from privatelora.runtime.wire.messages import Message, Role
from privatelora.runtime.wire.state import Phase, SessionPhase
from privatelora.transports.framing import HEADER, HEADER_NBYTES, MAGIC
from tests.fuzz.campaign import check_error, check_message
from tests.fuzz.cases import Target, targets
from tests.fuzz.end import MAX_FRAME_NBYTES, End, Tally
from tests.fuzz.recordings import Follower, Recording, recordings, streamed


def frames_of(recording: Recording) -> list[bytes]:
    """What the end hears, one piece of the stream for each frame."""
    return [streamed(event.frame) for event in recording.heard]


def messages_of(recording: Recording) -> list[Message | None]:
    return [event.message for event in recording.heard]


def heard_by(end: End) -> list[Message | None]:
    return [message for _, message in end.heard]


# One of either end for every script, each with other codecs.
SOME = [r for r in recordings() if r.heard][::7]
some = pytest.mark.parametrize("recording", SOME, ids=lambda r: f"{r.role}-{len(r.events)}")


def test_recordings_lead_everywhere() -> None:
    """So that the fuzzer, which starts from them, meets every state."""
    phases, sessions, steps = set(), set(), set()
    for target in targets():
        role, wire = target.recording.role, target.end(Tally()).wire
