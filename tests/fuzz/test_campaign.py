"""The fuzzer itself, in short: what it meets, what it finds, how it says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.wire import state
from privatelora.runtime.wire.codec import decode
from privatelora.runtime.wire.messages import ExchangeReply, Message
from privatelora.runtime.wire.prelude import TYPES, WireLimits
from tests.fuzz import campaign
from tests.fuzz.__main__ import main
from tests.fuzz.campaign import Campaign, garbage_apart
from tests.fuzz.end import VERDICTS, Y


async def run(seed: int, num_frames: int) -> Campaign:
    tried = Campaign(seed)
    with garbage_apart():
        tried.run(num_frames)
    return tried


async def test_a_short_run() -> None:
    """No finding, and it got everywhere: every message, every verdict, every codec."""
    tried = await run(1, 8000)
    assert tried.num_frames == 8000
    assert {verdict for _, verdict in tried.tally.frames} == set(VERDICTS)
    for kind in TYPES:
        for verdict in ("message", "late", "format", "order"):
            assert tried.tally.frames[kind.__name__, verdict], (kind, verdict)
    for codec in CODEC_NAMES:
        assert tried.tally.tensors[codec, True], codec
        assert tried.tally.tensors[codec, False], codec


async def test_every_run_is_the_same() -> None:
    first, second, other = [await run(seed, 1000) for seed in (2, 2, 3)]
    assert first.outcomes == second.outcomes
    assert first.tally == second.tally
    assert first.tally != other.tally


def test_every_process_has_the_same_frames(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever order it would go through a set in."""

    def tables(output: str) -> list[str]:
        return output.partition("slowest")[0].splitlines()[1:]

    arguments = ["--frames", "300", "--seed", "4"]
    assert main(arguments) == 0
    other = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert tables(other.stdout) == tables(capsys.readouterr().out)


def decode_badly(frame: memoryview, limits: WireLimits) -> Message:
    """Fails over what is not often wrong."""
    message = decode(frame, limits)
    if isinstance(message, ExchangeReply) and message.y.shape[1] != Y:
        raise IndexError("list index out of range")
    return message


def test_a_finding_can_be_made_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(state, "decode", decode_badly)
    assert main(["--frames", "20000", "--seed", "1"]) == 1
    first, _ = capsys.readouterr()
    assert first.startswith("IndexError: list index out of range\nframe ")
    again = re.search(r"python -m tests\.fuzz (.*)", first)
    assert again is not None
    assert main(again[1].split()) == 1
    second, _ = capsys.readouterr()
    assert second.splitlines()[:4] == first.splitlines()[:4]
    monkeypatch.undo()
    assert main(again[1].split()) == 0


@pytest.mark.parametrize(
    ("bound", "value", "finding"),
    [("MAX_FRAME_US", 0.0, "a frame took"), ("MAX_GROWTH_NBYTES", -1, "memory has grown")],
)
def test_time_and_memory_are_bounded(
    bound: str,
    value: float,
    finding: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(campaign, bound, value)
    monkeypatch.setattr(campaign, "WARM_UP_FRAMES", 100)
    assert main(["--frames", "200"]) == 1
    assert capsys.readouterr().out.startswith(finding)


def test_the_command_stops_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--frames", "1000000000", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.startswith("1000 frames of seed 1 in ")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m tests.fuzz --frames 1000000 --seed 1" in capsys.readouterr().out
