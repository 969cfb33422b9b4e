"""What a hostile process on the same machine gives a cloud that listens on ``shm://``."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from random import Random
from typing import NamedTuple

from privatelora.transports.shm_ring import HEADER_NBYTES
from privatelora.transports.shm_shared import MEMORY_NBYTES, Shared, close_all
from tests.fuzz.daemons.conversation import Conversation
from tests.fuzz.daemons.inputs import Input, Outcome, Violation
from tests.fuzz.daemons.pipes import END_DEADLINE_S, WAIT_S
from tests.fuzz.daemons.streams import foreign
from tests.fuzz.mutations import below, mutate, pick, spoil_stream
from tests.fuzz.recordings import streamed
from tests.transports.shm_raw import HELLO, socket_name

_WORDS = (0, 128, 256, 384)
"""Offsets of head, tail, data_wanted and room_wanted in each ring: transports/shm_ring.py."""
_RING_NBYTES = MEMORY_NBYTES // 2
_POSITIONS = (
    *(0, 1, 7, 8, 9, 2**20 - 1, 2**20, 2**20 + 1, 2**21, 2**31, 2**32, 2**62, 2**63 - 1),
    *(2**63, 2**63 + 1, 2**63 + 2**20, 2**64 - 1),
)


class _Change(NamedTuple):
    """``offset`` of a word in the memory and what is written there, by whoever it belongs to."""

    offset: int
    value: int


class ShmInputs:
    """Makes inputs for the socket and for the shared memory."""

    def __init__(self, address: str, conversations: Sequence[Conversation]) -> None:
        self._name = socket_name(address)
        self._frames = tuple(
            frame
            for conversation in conversations
            for turn in conversation
            for frame in turn.frames
        )

    def make(self, rng: Random) -> Input:
        which = rng.random()
        if which < 0.2:
            return self._spoilt_hello(rng)
        if which < 0.4:
            return self._spoilt_descriptors(rng)
        hello = self._frames[0]
        kind = pick(rng, ("stream spoilt", "frame spoilt", "position", "position"))
        changes: list[_Change] = []
        if kind == "position":
            stream = streamed(hello)
            for _ in range(1 + below(rng, 3)):
                offset = below(rng, 2) * _RING_NBYTES + pick(rng, _WORDS)
                changes.append(_Change(offset, pick(rng, _POSITIONS)))
        elif kind == "stream spoilt":
            stream = spoil_stream(rng, streamed(hello), pick(rng, self._frames))
        else:
            first = streamed(mutate(rng, hello, pick(rng, self._frames)))
            stream = first + streamed(pick(rng, self._frames))
        ends, waits = rng.random() < 0.5, rng.random() < 0.2
        send = partial(self._write, stream, tuple(changes), ends=ends, waits=waits)
        return Input(f"memory: {kind}", send)

    def _spoilt_hello(self, rng: Random) -> Input:
        kind, data = foreign(rng)
        if rng.random() < 0.5:
            kind = "hello spoilt"
            data = pick(rng, (HELLO[:-1], HELLO + b"x", b"PLSM" + rng.randbytes(4), HELLO[::-1]))
        return Input(f"socket: {kind}", partial(self._say, data, _no_descriptors))

    def _spoilt_descriptors(self, rng: Random) -> Input:
        make = pick(rng, (_no_descriptors, *_DESCRIPTORS))
        return Input(
            f"socket: {make.__name__[1:].replace('_', ' ')}", partial(self._say, HELLO, make)
        )

    async def _say(self, data: bytes, make: object) -> Outcome:
        """Send one message with what ``make`` makes, and wait until the listener lets go."""
        assert callable(make)
        sock = await _connect(self._name)
        fds: list[int] = make()
        try:
            if fds:
                socket.send_fds(sock, [data], fds)
            elif data:
                sock.send(data)
            sock.shutdown(socket.SHUT_WR)
            return await _last_words(sock)
        except OSError:
            return Outcome.CLOSED
        finally:
            close_all(fds)
            sock.close()

    async def _write(
        self, stream: bytes, changes: tuple[_Change, ...], *, ends: bool, waits: bool
    ) -> Outcome:
        """Connect, write into the memory and ring, as often as there are changes."""
        sock = await _connect(self._name)
        shared = Shared.create()
        try:
            socket.send_fds(sock, [HELLO], shared)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(END_DEADLINE_S):
                if await loop.sock_recv(sock, 64) != HELLO:
                    return Outcome.REFUSED
            with mmap.mmap(shared.memory, MEMORY_NBYTES) as memory:
                memory[HEADER_NBYTES : HEADER_NBYTES + len(stream)] = stream
                struct.pack_into("=Q", memory, _WORDS[0], len(stream) | (ends << 63))
                os.eventfd_write(shared.listener_doorbell, 1)
                for change in changes:
                    await asyncio.sleep(0)
                    struct.pack_into("=Q", memory, change.offset, change.value)
                    os.eventfd_write(shared.listener_doorbell, 1)
                if waits:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(WAIT_S):
                            await loop.sock_recv(sock, 64)
                has_said = struct.unpack_from("=Q", memory, _RING_NBYTES)[0] > 0
            sock.shutdown(socket.SHUT_WR)
            ended = await _last_words(sock)
            return Outcome.ANSWERED if has_said else ended
        except OSError:
            return Outcome.CLOSED
        finally:
            close_all(shared)
            sock.close()


async def _connect(name: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        while (code := sock.connect_ex(name)) != 0:
            if code != 11:  # EAGAIN: too many wait
                raise Violation(f"cannot connect: {os.strerror(code)}")
            await asyncio.sleep(0.001)
    except BaseException:
        sock.close()
        raise
    return sock


async def _last_words(sock: socket.socket) -> Outcome:
    """What the listener still says; it has to close. Raises OSError or Violation."""
    loop = asyncio.get_running_loop()
    heard = b""
    try:
        async with asyncio.timeout(END_DEADLINE_S):
            while data := await loop.sock_recv(sock, 64):
                heard += data
    except TimeoutError as error:
        raise Violation(f"a socket was not closed in {END_DEADLINE_S:g} s") from error
    return Outcome.REFUSED if heard else Outcome.CLOSED


def _no_descriptors() -> list[int]:
    return []


def _memory_of_another_size() -> list[int]:
    fds = list(Shared.create())
    os.close(fds[0])
    fds[0] = os.memfd_create("small", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fds[0], 4096)
    return fds


def _memory_not_sealed() -> list[int]:
    fds = list(Shared.create())
    os.close(fds[0])
    fds[0] = os.memfd_create("open", os.MFD_CLOEXEC)
    os.ftruncate(fds[0], MEMORY_NBYTES)
    return fds


def _a_pipe_for_a_doorbell() -> list[int]:
    fds = list(Shared.create())
    os.close(fds[1])
    reading, fds[1] = os.pipe()
    os.close(reading)
    return fds


def _a_file_for_memory() -> list[int]:
    fds = list(Shared.create())
    os.close(fds[0])
    fds[0] = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    return fds


def _a_descriptor_too_few() -> list[int]:
    fds = list(Shared.create())
    os.close(fds.pop())
    return fds


def _descriptors_too_many() -> list[int]:
    return [*Shared.create(), *Shared.create()]


def _descriptors_in_another_order() -> list[int]:
    return list(Shared.create())[::-1]


_DESCRIPTORS = (
    _memory_of_another_size,
    _memory_not_sealed,
    _a_pipe_for_a_doorbell,
    _a_file_for_memory,
    _a_descriptor_too_few,
    _descriptors_too_many,
    _descriptors_in_another_order,
)
