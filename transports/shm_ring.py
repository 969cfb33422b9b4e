"""A ring of bytes in memory that two processes share: one end writes, the other reads.

No event loop and no system call here: what wakes a sleeping peer is a callback.

**Layout.** A header of ``HEADER_NBYTES``, then the data; all numbers are native u64. The header
holds four words, each with one writer and on a cache line of its own (apart from its neighbour,
too, as processors fetch lines in pairs):

    head         by the writer: how many bytes it has written since the beginning, and ENDED
    tail         by the reader: how many it has read
    data_wanted  by the reader: "wake me when head passes this"
    room_wanted  by the writer: "wake me when tail reaches this"

Positions only grow, and 2^63 bytes take centuries. An end sees to its own position itself; what
the peer wrote is read once, into a Python int, and checked before it is used.

**Waking.** An end that is about to sleep announces at what position it wants to be woken and
looks once more; its peer wakes it when it moves its own position across that mark, thus once
per announcement and never while the end is awake and keeps up.

**Order.** Neither compiler nor processor may swap these: for the writer, writing data before
``head``, and looking at ``tail`` before using the room; for the reader, looking at ``head``
before reading data, and that before ``tail``; for both, writing the own word before looking at
the peer's. (Were that look too early on both ends, one would sleep and the other not wake it.)
So there is a full fence in each of these places. Python has none by that name: ``_fence``
releases a lock that nobody else knows and takes it again. What comes before a release stays
before it, what comes after an acquisition stays after it, and an acquisition does not overtake
an earlier release; this holds for the semaphores and atomics of which CPython makes its locks,
on x86 (locked instructions, each a fence) as on ARMv8 (release and acquire operations). The
words are aligned, and CPython copies an item of a memoryview with a memcpy of constant size,
which becomes one load or store on a 64-bit machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

from privatelora.errors import RemoteProtocolError
from privatelora.transports.base import Buffer

HEADER_NBYTES = 512

_HEAD, _TAIL, _DATA_WANTED, _ROOM_WANTED = 0, 16, 32, 48
_ENDED = 1 << 63


class _RingEnd:
    """What both ends have. ``memory``: header and data; ``peer``: for messages to people."""

    def __init__(self, memory: memoryview, wake_peer: Callable[[], None], peer: str) -> None:
        self._words = memory[:HEADER_NBYTES].cast("Q")
        self._data = memory[HEADER_NBYTES:]
        self._capacity = len(self._data)
        # Done in steps, so that the other end can work on one part while this end is at the next.
        self._step = max(self._capacity // 4, 1)
        self._wake_peer = wake_peer
        self._peer = peer
        self._head = 0
        self._tail = 0
        lock = Lock()
        lock.acquire()
        self._release_lock, self._take_lock = lock.release, lock.acquire

    def release(self) -> None:
        """Let go of the memory; nothing else may be called afterwards."""
        self._words.release()
        self._data.release()

    def _fence(self) -> None:
        self._release_lock()
        self._take_lock()

    def _wild(self, head: int, tail: int) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"{self._peer} wrote an impossible position into the shared memory (written {head}, "
            f"read {tail}, room for {self._capacity}); check what runs in that process"
        )


class RingWriter(_RingEnd):
    """The end that writes. ``wake_peer`` is called when the reader asked to be woken."""

    def write(self, buffers: Sequence[Buffer]) -> int:
        """Copy the start of ``buffers`` into the ring; return how many bytes, 0 if it is full.

        Raises RemoteProtocolError if the reader's position is impossible.
        """
        data, capacity, step = self._data, self._capacity, self._step
        before = head = self._head
        left = capacity - head + self._tail
        if left < step:
            left = capacity - head + self._look()
        if left > step:
            left = step
        for buffer in buffers:
            if not left:
                break
            view = memoryview(buffer)
            nbytes = view.nbytes
            if not nbytes:
                continue  # with a zero in its shape it could not be cast
            view = view.cast("B")
            if nbytes > left:
                view, nbytes = view[:left], left
            start = head % capacity
            stop = start + nbytes
            if stop <= capacity:
                data[start:stop] = view
            else:
                data[start:] = view[: capacity - start]
                data[: stop - capacity] = view[capacity - start :]
            head += nbytes
            left -= nbytes
        if head > before:
            self._head = head
            self._fence()
            self._words[_HEAD] = head
            self._fence()
            if before <= self._words[_DATA_WANTED] < head:
                self._wake_peer()
        return head - before

    def end(self) -> None:
        """Tell the reader that nothing will follow. May be repeated."""
        self._words[_HEAD] = self._head | _ENDED
        self._fence()
        self._wake_peer()

    def ask_for_room(self) -> bool:
        """Ask to be woken when there is a good deal of room; True if there is already."""
        lowest = self._head - self._capacity
        wanted = max(lowest + self._step, 0)
        self._words[_ROOM_WANTED] = wanted
        self._fence()
        # Room as well if the position is impossible: write() will say so.
        return not lowest <= self._words[_TAIL] < wanted

    def _look(self) -> int:
        """The reader's position now."""
        tail = self._words[_TAIL]
        if not self._tail <= tail <= self._head:
            raise self._wild(self._head, tail)
        self._tail = tail
        self._fence()
        return tail


class RingReader(_RingEnd):
    """The end that reads. ``wake_peer`` is called when the writer asked to be woken."""

    def __init__(self, memory: memoryview, wake_peer: Callable[[], None], peer: str) -> None:
        super().__init__(memory, wake_peer, peer)
        self._end_announced = False

    @property
    def ended(self) -> bool:
        """Whether the writer has ended and everything was read, as far as ``read_into`` saw."""
        return self._end_announced and self._head == self._tail

    def read_into(self, buffer: memoryview | bytearray) -> int:
        """Copy bytes that are there into the start of ``buffer``; return how many, maybe 0.

        Raises RemoteProtocolError if the writer's position is impossible.
        """
        capacity, tail = self._capacity, self._tail
        nbytes = self._head - tail or self._look()
        if not nbytes:
            return 0
        if nbytes > self._step:
            nbytes = self._step
        if nbytes > len(buffer):
            nbytes = len(buffer)
        start = tail % capacity
        stop = start + nbytes
        if stop <= capacity:
            buffer[:nbytes] = self._data[start:stop]
        else:
            buffer[: capacity - start] = self._data[start:]
            buffer[capacity - start : nbytes] = self._data[: stop - capacity]
        self._tail = after = tail + nbytes
        self._fence()
        self._words[_TAIL] = after
        self._fence()
        if tail < self._words[_ROOM_WANTED] <= after:
            self._wake_peer()
        return nbytes

    def ask_for_data(self) -> bool:
        """Ask to be woken when something comes; True if something or the end is there already."""
        self._words[_DATA_WANTED] = self._tail
        self._fence()
        # An impossible position counts too: read_into() will say so.
        return self._words[_HEAD] != self._tail

    def _look(self) -> int:
        """How many bytes are there that were not known of."""
        head = self._words[_HEAD]
        if head == self._tail:
            return 0
        if head & _ENDED:
            self._end_announced = True
            head ^= _ENDED
        if not self._tail <= head <= self._tail + self._capacity:
            raise self._wild(head, self._tail)
        self._head = head
        self._fence()
        return head - self._tail
