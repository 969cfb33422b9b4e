"""The timeline and the faults of one emulated direction, without a loop or a clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.errors import ConfigError
from privatelora.transports.emulated_link import Impairment, Link, Passage

KIB = 1024
FRAME = memoryview(bytes(range(256)) * 3)


def link(seed: str = "1", **impairment: float) -> Link:
    return Link(Impairment(**impairment), seed)


def passages(count: int, frame: memoryview = FRAME, **impairment: float) -> list[Passage]:
    carrier = link(**impairment)
    return [carrier.schedule(frame, float(number)) for number in range(count)]


def shape(passage: Passage) -> tuple[bytes, bool, str]:
    """What happened to a frame."""
    return bytes(passage.frame or b""), passage.lost, passage.faults


# Settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"bandwidth_mbps": 0}, r"bandwidth_mbps must be at least 0.001"),
        ({"bandwidth_mbps": math.inf}, r"bandwidth_mbps must be at least 0.001"),
        ({"bandwidth_mbps": math.nan}, r"bandwidth_mbps must be at least 0.001"),
        ({"delay_ms": -1}, r"delay_ms must be from 0 to 3600000, not -1"),
        ({"delay_ms": math.nan}, "delay_ms must be from 0"),
        ({"delay_ms": 4e6}, "delay_ms must be from 0"),
        ({"jitter_ms": -1}, "jitter_ms must be from 0"),
        ({"delay_ms": 1, "jitter_ms": 2}, r"jitter_ms \(2\) must not exceed delay_ms \(1\)"),
        ({"stall_ms": math.inf, "stall_probability": 1}, "stall_ms must be from 0"),
        ({"stall_ms": 5}, "set both"),
        ({"stall_probability": 0.5}, "set both"),
        ({"truncate_probability": 1.01}, "truncate_probability must be from 0 to 1"),
        ({"corrupt_probability": -0.1}, "corrupt_probability must be from 0 to 1"),
        ({"drop_probability": math.nan}, "drop_probability must be from 0 to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Impairment(**setting)


# Times


def test_nothing_set_changes_nothing() -> None:
    for number, passage in enumerate(passages(100)):
        assert passage.arrival == number
        assert shape(passage) == (bytes(FRAME), False, "")


def test_frames_follow_each_other_at_the_bandwidth_and_arrive_the_delay_later() -> None:
    carrier = link(bandwidth_mbps=0.8, delay_ms=20)
    sent = [(0, 0.0), (100_000, 0.0), (50_000, 0.3), (100_000, 10.0), (0, 10.0)]
    arrivals = [carrier.schedule(memoryview(bytes(size)), ready).arrival for size, ready in sent]
    assert arrivals == pytest.approx([0.02, 1.02, 1.52, 11.02, 11.02])


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 3)), min_size=1),
    st.floats(0.01, 1000),
    st.floats(0, 500),
)
def test_a_link_is_never_faster_than_set_and_never_idle_with_work(
    sizes_and_pauses: list[tuple[int, float]], mbps: float, delay_ms: float
) -> None:
    carrier = link(bandwidth_mbps=mbps, delay_ms=delay_ms)
    ready, free_at = 0.0, 0.0
    for size, pause in sizes_and_pauses:
        ready += pause
        free_at = max(free_at, ready) + size * 8 / (mbps * 1e6)
        arrival = carrier.schedule(memoryview(bytes(size)), ready).arrival
        assert arrival == pytest.approx(free_at + delay_ms / 1e3)


def test_jitter_spreads_over_its_whole_width() -> None:
    delays = [
        passage.arrival - number
        for number, passage in enumerate(passages(2000, delay_ms=100, jitter_ms=40))
    ]
    assert min(delays) == pytest.approx(0.06, abs=0.001)
    assert max(delays) == pytest.approx(0.14, abs=0.001)
    assert mean(delays) == pytest.approx(0.1, abs=0.002)


def test_jitter_keeps_the_order() -> None:
    carrier = link(delay_ms=100, jitter_ms=100)
    arrivals = [carrier.schedule(FRAME, number / 1000).arrival for number in range(1000)]
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) > 50


def test_a_stall_holds_up_a_frame_and_those_behind_it() -> None:
    carrier = link(stall_probability=1, stall_ms=200, delay_ms=10)
    arrivals = [carrier.schedule(FRAME, ready).arrival for ready in (0.0, 0.0, 5.0)]
    assert arrivals == pytest.approx([0.21, 0.41, 5.21])


def test_the_end_comes_last_and_suffers_nothing() -> None:
    carrier = link(delay_ms=10, jitter_ms=10, stall_probability=1, stall_ms=100, drop_probability=1)
    last = carrier.schedule(FRAME, 0.0)
    end = carrier.schedule_end(0.0)
    assert end.frame is None
    assert (end.lost, end.faults) == (False, "")
    assert last.arrival <= end.arrival <= 0.121
    assert link(delay_ms=10).schedule_end(7.0).arrival == pytest.approx(7.01)


# Faults


@pytest.mark.parametrize("probability", [0.003, 0.1, 0.5, 1])
@pytest.mark.parametrize(
    ("setting", "is_hit"),
    [
        ("drop_probability", lambda passage: passage.lost),
        ("truncate_probability", lambda passage: len(passage.frame) < len(FRAME)),
        ("corrupt_probability", lambda passage: passage.frame != FRAME),
        ("stall_probability", lambda passage: "stalled for 7 ms" in passage.faults),
    ],
)
def test_faults_are_as_frequent_as_set(
    setting: str, is_hit: Callable[[Passage], bool], probability: float
) -> None:
    count = 5000
    stall_ms = {"stall_ms": 7} if setting == "stall_probability" else {}
    hits = sum(map(is_hit, passages(count, **{setting: probability, **stall_ms})))
    deviation = math.sqrt(count * probability * (1 - probability))
    assert abs(hits - count * probability) <= 4 * deviation


def test_truncation_takes_a_random_tail() -> None:
    frames = [bytes(p.frame or b"") for p in passages(3000, truncate_probability=1)]
    assert all(bytes(FRAME).startswith(frame) for frame in frames)
    lengths = [len(frame) for frame in frames]
    assert (min(lengths), max(lengths)) == (0, len(FRAME) - 1)
    assert mean(lengths) == pytest.approx(len(FRAME) / 2, rel=0.05)


def test_corruption_flips_a_few_bits_anywhere() -> None:
    places, counts = set(), set()
    for passage in passages(3000, corrupt_probability=1):
        frame = passage.frame or memoryview(b"")
        assert len(frame) == len(FRAME)
        flipped = int.from_bytes(frame, "little") ^ int.from_bytes(FRAME, "little")
        places.add(flipped.bit_length() - 1)
        counts.add(flipped.bit_count())
        assert passage.faults == f"{flipped.bit_count()} bits flipped"
    assert counts == {1, 2, 3, 4}
    assert min(places) < 8 * 16
    assert max(places) > 8 * (len(FRAME) - 16)


def test_a_damaged_frame_is_a_copy() -> None:
    frame = memoryview(bytearray(100))
    for passage in passages(50, frame, truncate_probability=0.5, corrupt_probability=0.5):
        assert passage.frame is not None
    assert bytes(frame) == bytes(100)


@pytest.mark.parametrize("size", [0, 1])
def test_tiny_frames_survive_every_fault(size: int) -> None:
    frame = memoryview(bytes(size))
    for passage in passages(100, frame, truncate_probability=0.5, corrupt_probability=0.5):
        assert passage.frame is not None
        assert len(passage.frame) <= size


ALL_FAULTS = {
    "truncate_probability": 0.2,
    "corrupt_probability": 0.2,
    "drop_probability": 0.2,
    "stall_probability": 0.2,
    "stall_ms": 5,
}


def test_the_same_seed_makes_the_same_faults_whenever_frames_come() -> None:
    fast, slow = link("7", **ALL_FAULTS), link("7", **ALL_FAULTS)
    for number in range(300):
        assert shape(fast.schedule(FRAME, 0.0)) == shape(slow.schedule(FRAME, 3.0 * number))


def test_another_seed_makes_other_faults() -> None:
    one, other = link("7", **ALL_FAULTS), link("8", **ALL_FAULTS)
    shapes = [
        (shape(one.schedule(FRAME, 0.0)), shape(other.schedule(FRAME, 0.0))) for _ in "x" * 50
    ]
    assert any(first != second for first, second in shapes)


def test_a_fault_does_not_depend_on_other_settings_or_earlier_frames() -> None:
    plain = link("7", drop_probability=0.3)
    rich = link("7", **{**ALL_FAULTS, "drop_probability": 0.3, "delay_ms": 5, "jitter_ms": 5})
    lost = [plain.schedule(FRAME, 0.0).lost for _ in range(200)]
    assert lost == [rich.schedule(FRAME[:number], 0.0).lost for number in range(200)]
    assert any(lost)


# The window


@pytest.mark.parametrize(
    ("impairment", "nbytes"),
    [
        ({}, 16 * KIB**2),
        ({"delay_ms": 200}, 16 * KIB**2),
        ({"bandwidth_mbps": 0.5, "delay_ms": 20}, 64 * KIB),
        ({"bandwidth_mbps": 100}, 625_000),
        ({"bandwidth_mbps": 100, "delay_ms": 90, "jitter_ms": 10}, 3_125_000),
        ({"bandwidth_mbps": 1e9, "delay_ms": 1000}, 64 * KIB**2),
    ],
)
def test_window(impairment: dict[str, float], nbytes: int) -> None:
    assert link(**impairment).window_nbytes == nbytes


def test_a_frame_leaves_the_window_while_it_arrives() -> None:
    carrier = link(bandwidth_mbps=0.008, delay_ms=5000)
    carrier.enter(carrier.schedule(memoryview(bytes(1000)), 0.0))
    carrier.enter(carrier.schedule(memoryview(bytes(1000)), 0.0))
    size = 1256
    assert carrier.time_of_holding(2 * size, 0.0) == 0.0
    assert carrier.time_of_holding(int(1.75 * size), 0.0) == pytest.approx(5.25)
    assert carrier.time_of_holding(int(1.75 * size), 5.5) <= 5.5
    assert carrier.time_of_holding(int(1.25 * size), 5.5) == pytest.approx(5.75)
    assert carrier.time_of_holding(size - 1, 0.0) == math.inf
    assert carrier.time_of_holding(size, 6.0) == math.inf  # due, and somebody has to take it
    carrier.leave()
    assert carrier.time_of_holding(size, 6.0) == 6.0
    assert carrier.time_of_holding(0, 6.0) == pytest.approx(7.0)
    carrier.clear()
    assert carrier.time_of_holding(0, 6.0) == 6.0
    assert carrier.head is None
