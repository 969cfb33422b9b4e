"""Cutting a byte stream into frames, without a socket."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.transports.flow import FrameQueue
from privatelora.transports.framing import HEADER, MAGIC, FrameReader, frame_nbytes

LIMIT = 2**20


def stream_of(frames: list[bytes]) -> bytes:
    return b"".join(HEADER.pack(MAGIC, len(frame)) + frame for frame in frames)


class Feeder:
    """Feeds a FrameReader in pieces and takes what comes out."""

    def __init__(self, max_queued_nbytes: int = 2**30, max_frame_nbytes: int = LIMIT) -> None:
        self.queue = FrameQueue(max_queued_nbytes, self._cut)
        self.reader = FrameReader(self.queue, max_frame_nbytes, "tcp://peer:1")
        self.num_frames = 0

    def _cut(self) -> None:
        self.num_frames += self.reader.cut()

    def feed(self, data: bytes) -> None:
        while data:
            assert not self.queue.full
            size = min(len(data), len(self.reader.free))
            assert size > 0
            self.reader.free[:size] = data[:size]
            self.num_frames += self.reader.advance(size)
            data = data[size:]

    def take(self) -> list[bytes]:
        taken = []
        while self.queue.frames:
            taken.append(bytes(self.queue.pop()))
        return taken


frame_lists = st.lists(
    st.one_of(
        st.binary(max_size=50),
        st.sampled_from([16_376, 16_384, 16_385, 65_528, 65_536, 100_000]).map(bytes),
    ),
    max_size=6,
)


@given(frames=frame_lists, data=st.data())
async def test_any_split_gives_the_same_frames(frames: list[bytes], data: st.DataObject) -> None:
    stream = stream_of(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    feeder = Feeder()
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        feeder.feed(stream[start:stop])
    assert not feeder.reader.in_frame
    assert feeder.num_frames == len(frames)
    assert feeder.take() == frames


@given(frames=frame_lists.filter(bool), max_queued_nbytes=st.integers(1, 3000))
async def test_a_full_queue_stops_the_cutting(frames: list[bytes], max_queued_nbytes: int) -> None:
    feeder = Feeder(max_queued_nbytes)
    stream, taken = stream_of(frames), []
    while stream:
        size = min(len(stream), len(feeder.reader.free))
        feeder.feed(stream[:size])
        stream = stream[size:]
        most = max_queued_nbytes // 256 + 1
        assert len(feeder.queue.frames) <= most
        taken += feeder.take()
    assert taken == frames
    assert not feeder.reader.in_frame


@pytest.mark.parametrize("size", [0, 1, 40_000, 100_000])
async def test_in_frame_until_the_last_byte(size: int) -> None:
    feeder = Feeder()
    stream = stream_of([bytes(size)])
    for position in range(1, len(stream), 1 + size // 50):
        probe = Feeder()
        probe.feed(stream[:position])
        assert probe.reader.in_frame
        assert not probe.queue.frames
    feeder.feed(stream)
    assert not feeder.reader.in_frame


@pytest.mark.parametrize(
    "garbage", [b"G", b"PLR2", b"PL\r\n", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", bytes(4)]
)
@pytest.mark.parametrize("before", [[], [b"frame"]])
async def test_garbage_is_recognised_in_its_first_bytes(
    before: list[bytes], garbage: bytes
) -> None:
    feeder = Feeder()
    with pytest.raises(RemoteProtocolError, match="does not send PrivateLoRA frames") as caught:
        feeder.feed(stream_of(before) + garbage)
    assert repr(garbage[:16]) in str(caught.value)
    assert "tcp://peer:1" in str(caught.value)
    assert feeder.take() == before


@pytest.mark.parametrize("declared", [LIMIT + 1, 2**32 - 1])
async def test_a_declared_length_over_the_limit_allocates_nothing(declared: int) -> None:
    feeder = Feeder()
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match=f"{declared} bytes.* limit of {LIMIT}"):
            feeder.feed(HEADER.pack(MAGIC, declared))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("arrived", [0, 20_000, 100_000, 2 * 2**20])
async def test_a_frame_takes_memory_as_it_arrives(arrived: int) -> None:
    feeder = Feeder(max_frame_nbytes=64 * 2**20)
    piece = bytes(10_000)
    tracemalloc.start()
    try:
        feeder.feed(HEADER.pack(MAGIC, 64 * 2**20))
        for _ in range(0, arrived, len(piece)):
            feeder.feed(piece)
        assert tracemalloc.get_traced_memory()[1] < 5 * arrived + 100_000
    finally:
        tracemalloc.stop()


async def test_a_reader_takes_little_until_it_is_used_and_nothing_after() -> None:
    tracemalloc.start()
    try:
        feeder = Feeder(max_frame_nbytes=64 * 2**20)
        assert tracemalloc.get_traced_memory()[0] < 10_000
        feeder.feed(HEADER.pack(MAGIC, 64 * 2**20) + bytes(2**20))
        assert tracemalloc.get_traced_memory()[0] > 2**20
        feeder.reader.release()
        assert tracemalloc.get_traced_memory()[0] < 10_000
    finally:
        tracemalloc.stop()


async def test_frames_are_writable_memory_of_their_own() -> None:
    feeder = Feeder()
    feeder.feed(stream_of([b"one", b"two", bytes(50_000)]))
    one, two, large = (feeder.queue.pop() for _ in range(3))
    one[:] = b"ONE"
    feeder.feed(stream_of([b"x" * 30_000]))
    assert [bytes(frame) for frame in (one, two, large)] == [b"ONE", b"two", bytes(50_000)]
    assert isinstance(large.obj, bytearray)


def test_frame_nbytes() -> None:
    assert frame_nbytes((), 10) == 0
    assert frame_nbytes((b"ab", bytearray(3), memoryview(bytes(8)).cast("I")), 13) == 13
    with pytest.raises(LocalProtocolError, match="14 bytes"):
        frame_nbytes((bytes(14),), 13)
