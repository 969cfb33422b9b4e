"""shm:// against a peer that shook hands and then does not keep the rules."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Protocol

import pytest

from privatelora.errors import ConnectionClosed, RemoteProtocolError
from privatelora.transports.base import Connection, Limits
from privatelora.transports.framing import HEADER, MAGIC
from privatelora.transports.shm_ring import HEADER_NBYTES, RingReader, RingWriter
from privatelora.transports.shm_shared import MEMORY_NBYTES, Shared, close_all
from tests.transports.conftest import ShmAccept
from tests.transports.shm_raw import HELLO, last_words, raw_client
from tests.transports.support import HUGE, SMALL_QUEUE, blocked, echo, received, send_for_ever

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

HEAD, TAIL, DATA_WANTED, ROOM_WANTED = 0, 16, 32, 48


class RawPeer:
    """A client that shook hands and now does what it likes with what is shared."""

    def __init__(self, address: str, stack: ExitStack) -> None:
        shared = Shared.create()
        stack.callback(close_all, shared)
        self.doorbell, self.listeners_doorbell = shared.client_doorbell, shared.listener_doorbell
        view = stack.enter_context(memoryview(stack.enter_context(mmap.mmap(shared.memory, 0))))
        half = MEMORY_NBYTES // 2
        outgoing, incoming = view[:half], view[half:]
        self.writer = RingWriter(outgoing, self.ring, "the listener")
        self.reader = RingReader(incoming, self.ring, "the listener")
        self.words_out = outgoing[:HEADER_NBYTES].cast("Q")
        self.words_in = incoming[:HEADER_NBYTES].cast("Q")
        for held in (self.writer, self.reader, self.words_out, self.words_in, outgoing, incoming):
            stack.callback(held.release)
        self.sock = stack.enter_context(raw_client(address))
        socket.send_fds(self.sock, [HELLO], shared)

    def ring(self) -> None:
        """Wake the listener's end."""
        os.eventfd_write(self.listeners_doorbell, 1)

    def send(self, payload: bytes) -> None:
        assert self.writer.write([HEADER.pack(MAGIC, len(payload)), payload]) == 8 + len(payload)


class OpenRaw(Protocol):
    async def __call__(self, limits: Limits = ...) -> tuple[RawPeer, Connection]: ...


@pytest.fixture
async def open_raw(shm_address: str, shm_accept: ShmAccept) -> AsyncIterator[OpenRaw]:
    """Shakes hands with a listener; returns the raw end and the listener's."""
    with ExitStack() as stack:

        async def open_raw(limits: Limits = SMALL_QUEUE) -> tuple[RawPeer, Connection]:
            accepted = await shm_accept(limits)
            raw = RawPeer(shm_address, stack)
            connection = await accepted.get()
            assert raw.sock.recv(100) == HELLO
            return raw, connection

        yield open_raw


async def refused(raw: RawPeer, connection: Connection) -> None:
    """The connection says whose fault it was and is of no more use to the peer."""
    with pytest.raises(RemoteProtocolError, match="wrote an impossible position"):
        await connection.recv()
    with pytest.raises(ConnectionClosed, match="aborted"):
        await connection.send(b"more")
    assert await last_words(raw.sock) == []


@pytest.mark.parametrize("head", [2**62, 2**63, 2**64 - 1, 3, 2**20 + 13])
async def test_a_wild_head(open_raw: OpenRaw, head: int) -> None:
    raw, connection = await open_raw()
    raw.send(b"fine")
    assert await received(connection) == b"fine"
    receiving = asyncio.create_task(connection.recv())
    await asyncio.sleep(0)
    raw.words_out[HEAD] = head
    raw.ring()
    with pytest.raises(RemoteProtocolError, match="wrote an impossible position"):
        await receiving
    await refused(raw, connection)


async def test_a_wild_head_without_a_wake_up(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.words_out[HEAD] = 2**40
    raw.sock.close()
    with pytest.raises(RemoteProtocolError, match="wrote an impossible position"):
        await connection.recv()


@pytest.mark.parametrize("tail", [2**62, 2**63, 2**64 - 1, 2**21])
@pytest.mark.parametrize("waits", [True, False])
async def test_a_wild_tail(open_raw: OpenRaw, tail: int, waits: bool) -> None:
    raw, connection = await open_raw()
    if waits:
        sending = await blocked(connection.send(bytes(HUGE)))
        raw.words_in[TAIL] = tail
        raw.ring()
    else:
        raw.words_in[TAIL] = tail
        sending = asyncio.create_task(send_for_ever(connection))
    with pytest.raises(ConnectionClosed, match=r"aborted: .* wrote an impossible position"):
        await sending
    await refused(raw, connection)


@pytest.mark.parametrize("seed", range(10))
async def test_wild_words_at_any_time(open_raw: OpenRaw, seed: int) -> None:
    """All of the peer's words and some of this end's, with and without wake-ups."""
    rng = random.Random(seed)
    raw, connection = await open_raw(Limits(max_frame_nbytes=1000, spin_s=0.0001))
    echoing = asyncio.create_task(echo(connection))
    sending = asyncio.create_task(send_for_ever(connection))
    for _ in range(300):
        action = rng.randrange(6)
        with contextlib.suppress(RemoteProtocolError):  # this end may be confused as well
            if action < 2:
                raw.send(rng.randbytes(rng.randint(0, 500)))
            elif action == 2:
                raw.reader.read_into(bytearray(1000))
            elif action == 3:
                raw.ring()
            elif rng.random() < 0.1:
                words = rng.choice([raw.words_out, raw.words_in])
                values = [rng.randrange(2**64), rng.randrange(2**21), 2**63 + rng.randrange(2**21)]
                words[rng.choice([HEAD, TAIL, DATA_WANTED, ROOM_WANTED])] = rng.choice(values)
        if rng.random() < 0.5:
            await asyncio.sleep(0)
    raw.sock.close()
    for task in (echoing, sending):
        with pytest.raises((RemoteProtocolError, ConnectionClosed)):
            await task


async def test_wake_ups_are_only_sent_when_asked_for(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    assert raw.reader.ask_for_data() is False
    for _ in range(100):
        await connection.send(b"frame")
    assert os.eventfd_read(raw.doorbell) == 1
    for _ in range(100):
        await connection.send(b"frame")
    with pytest.raises(BlockingIOError):
        os.eventfd_read(raw.doorbell)


async def test_a_doorbell_rung_without_end(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.reader.ask_for_data()
    for doorbell in (raw.doorbell, raw.listeners_doorbell):
        os.eventfd_write(doorbell, 2**64 - 2)
    await connection.send(b"not held up")
    assert raw.reader.read_into(bytearray(100)) == len(b"not held up") + 8
    receiving = asyncio.create_task(connection.recv())
    await asyncio.sleep(0.01)
    raw.send(b"nor this")
    assert bytes(await receiving) == b"nor this"


async def test_talking_on_the_socket_ends_the_connection(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.send(b"fine")
    raw.sock.send(b"hello?")
    assert await received(connection) == b"fine"
    with pytest.raises(ConnectionClosed, match="lost"):
        await connection.recv()


async def test_an_end_in_mid_frame(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.writer.write([HEADER.pack(MAGIC, 100), b"half of it"])
    raw.writer.end()
    with pytest.raises(ConnectionClosed, match="cut off a frame"):
        await connection.recv()


async def test_garbage_in_the_ring(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.writer.write([b"GET / HTTP/1.1"])
    with pytest.raises(RemoteProtocolError, match="does not send PrivateLoRA frames"):
        await connection.recv()
