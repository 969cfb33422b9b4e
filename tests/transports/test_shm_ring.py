"""The ring of shm:// without any process or loop: bytes, wake-ups, and a peer that lies."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.errors import RemoteProtocolError
from privatelora.transports.shm_ring import HEADER_NBYTES, RingReader, RingWriter, _RingEnd

U64 = 2**64


class Ring:
    """Both ends over one memory, and how often each was woken."""

    def __init__(self, capacity: int) -> None:
        self.memory = bytearray(HEADER_NBYTES + capacity)
        self.reader_wakes = self.writer_wakes = 0
        view = memoryview(self.memory)
        self.writer = RingWriter(view, self._wake_reader, "shm://the-reader")
        self.reader = RingReader(view, self._wake_writer, "shm://the-writer")
        self.words = view[:HEADER_NBYTES].cast("Q")

    def _wake_reader(self) -> None:
        self.reader_wakes += 1

    def _wake_writer(self) -> None:
        self.writer_wakes += 1

    def fill(self) -> None:
        while self.writer.write([b"0123456789"]):
            pass

    def read(self, nbytes: int = 1000) -> bytes:
        buffer = memoryview(bytearray(nbytes))
        return bytes(buffer[: self.reader.read_into(buffer)])

    def read_all(self) -> bytes:
        return b"".join(iter(self.read, b""))


operations = st.lists(
    st.one_of(
        st.lists(st.binary(max_size=40), max_size=4),  # write these
        st.integers(1, 80),  # read as many
    ),
    max_size=60,
)


@given(capacity=st.integers(1, 100), operations=operations)
def test_like_a_queue_of_bytes(capacity: int, operations: list[list[bytes] | int]) -> None:
    ring = Ring(capacity)
    queue = bytearray()
    for operation in operations:
        if isinstance(operation, int):
            read = ring.read(operation)
            assert read == queue[: len(read)]
            assert read or not queue
            del queue[: len(read)]
        else:
            joined = b"".join(operation)
            num_written = ring.writer.write(operation)
            assert num_written or not joined or len(queue) == capacity
            queue += joined[:num_written]
            assert len(queue) <= capacity
    assert not ring.reader.ended
    ring.writer.end()
    assert ring.read_all() == queue
    assert ring.reader.ended


@given(capacity=st.integers(1, 64), operations=operations)
def test_wake_ups_come_when_asked_for_and_only_then(
    capacity: int, operations: list[list[bytes] | int]
) -> None:
    ring = Ring(capacity)
    ring.writer.write([b"x"])
    ring.read()
    for operation in operations:
        if isinstance(operation, int):
            waits = not ring.writer.ask_for_room()
            before = ring.writer_wakes
            free = capacity - len(ring.read_all()) if waits else 0
            ring.read_all()
            assert ring.writer_wakes - before == waits
            assert free < max(capacity // 4, 1)
        else:
            waits = not ring.reader.ask_for_data()
            before = ring.reader_wakes
            written = [ring.writer.write(operation) for _ in range(3)]
            assert ring.reader_wakes - before == (waits and any(written))


def test_the_end_wakes_the_reader() -> None:
    ring = Ring(16)
    ring.writer.write([b"x"])
    ring.read()
    assert not ring.reader.ask_for_data()
    before = ring.reader_wakes
    ring.writer.end()
    assert ring.reader_wakes == before + 1
    assert ring.reader.ask_for_data()
    assert ring.read() == b""
    assert ring.reader.ended


# Sleeping while the other end acts


def interrupt(end: _RingEnd, fence: int, act: Callable[[], object]) -> None:
    """Let the other process ``act`` while ``end`` is at its ``fence``-th fence from now."""
    fences = itertools.count(1)
    real_fence = end._fence

    def fence_with_interruption() -> None:
        real_fence()
        if next(fences) == fence:
            act()

    end._fence = fence_with_interruption  # type: ignore[method-assign]


@pytest.mark.parametrize(("who", "fence"), [("reader", 1), ("writer", 1), ("writer", 2)])
def test_data_that_comes_while_the_reader_falls_asleep(who: str, fence: int) -> None:
    ring = Ring(16)
    ring.writer.write([b"x"])
    ring.read()
    before = ring.reader_wakes
    sees = []

    def ask() -> None:
        sees.append(ring.reader.ask_for_data())

    def write() -> None:
        assert ring.writer.write([b"y"]) == 1

    if who == "reader":
        interrupt(ring.reader, fence, write)
        ask()
    else:
        interrupt(ring.writer, fence, ask)
        write()
    assert sees[0] or ring.reader_wakes == before + 1
    assert ring.read_all() == b"y"


@pytest.mark.parametrize(
    ("who", "fence"), [("writer", 1), ("reader", 1), ("reader", 2), ("reader", 3)]
)
def test_room_that_comes_while_the_writer_falls_asleep(who: str, fence: int) -> None:
    ring = Ring(16)
    ring.fill()
    sees = []

    def ask() -> None:
        sees.append(ring.writer.ask_for_room())

    def read() -> None:
        assert ring.read() == b"0123"

    if who == "writer":
        interrupt(ring.writer, fence, read)
        ask()
    else:
        interrupt(ring.reader, fence, ask)
        read()
    assert sees[0] or ring.writer_wakes == 1
    assert ring.writer.write([b"y"]) == 1


# A peer that lies

HEAD, TAIL, DATA_WANTED, ROOM_WANTED = 0, 16, 32, 48
ENDED = 2**63


def used_ring() -> Ring:
    """Of 16 bytes; 24 were written, and the writer knows that 16 of them were read."""
    ring = Ring(16)
    for _ in range(4):
        assert ring.writer.write([b"four"]) == 4
    assert ring.read_all() == b"four" * 4
    for _ in range(2):
        assert ring.writer.write([b"more"]) == 4
    return ring


@pytest.mark.parametrize("head", [0, 15, 33, 2**62, ENDED - 1, ENDED, ENDED | 33, U64 - 1])
def test_an_impossible_head_is_refused(head: int) -> None:
    ring = used_ring()
    ring.words[HEAD] = head
    assert ring.reader.ask_for_data()
    with pytest.raises(RemoteProtocolError, match="shm://the-writer wrote an impossible position"):
        ring.read()


@pytest.mark.parametrize("tail", [0, 15, 41, 2**62, ENDED, U64 - 1])
def test_an_impossible_tail_is_refused(tail: int) -> None:
    ring = used_ring()
    ring.words[TAIL] = tail
    with pytest.raises(RemoteProtocolError, match="shm://the-reader wrote an impossible position"):
        ring.fill()


words = st.sampled_from([HEAD, TAIL, DATA_WANTED, ROOM_WANTED])
values = st.one_of(
    st.integers(0, 60),
    st.integers(ENDED, ENDED + 60),
    st.integers(0, U64 - 1),
    st.sampled_from([ENDED - 1, U64 - 1]),
)
steps = st.lists(
    st.one_of(
        st.tuples(words, values),
        st.sampled_from(["write", "read", "ask for data", "ask for room"]),
    ),
    max_size=40,
)


@given(steps=steps)
def test_wild_words_at_any_time(steps: list[tuple[int, int] | str]) -> None:
    """Each end refuses them or goes on; nothing else happens, in the ring or around it."""
    ring = Ring(16)
    for step in steps:
        try:
            if isinstance(step, tuple):
                word, value = step
                ring.words[word] = value
            elif step == "write":
                assert 0 <= ring.writer.write([b"some", b" ", b"bytes"]) <= 16
            elif step == "read":
                assert len(ring.read()) <= 16
            elif step == "ask for data":
                ring.reader.ask_for_data()
            else:
                ring.writer.ask_for_room()
        except RemoteProtocolError:
            pass
    used = {HEAD, TAIL, DATA_WANTED, ROOM_WANTED}
    assert all(not ring.words[word] for word in set(range(HEADER_NBYTES // 8)) - used)
    assert set(bytes(ring.memory[HEADER_NBYTES:])) <= set(b"some bytes\0")
