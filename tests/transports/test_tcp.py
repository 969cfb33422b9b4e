"""TCP against a raw socket: hostile, cut off and half-closed streams."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Protocol

import pytest

from privatelora.errors import ConnectionClosed, RemoteProtocolError
from privatelora.transports.base import Connection, Limits
from privatelora.transports.flow import AdaptiveSpin
from privatelora.transports.framing import HEADER, MAGIC
from privatelora.transports.registry import listen
from tests.transports.support import MIB, SMALL_QUEUE, blocked, received, send_for_ever, settled

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")


class OpenRaw(Protocol):
    async def __call__(self, limits: Limits = ...) -> tuple[socket.socket, Connection]: ...


@pytest.fixture
async def open_raw() -> AsyncIterator[OpenRaw]:
    """Connects a plain blocking socket to a listener; returns it and the listener's end."""
    async with AsyncExitStack() as stack:

        async def open_raw(limits: Limits = SMALL_QUEUE) -> tuple[socket.socket, Connection]:
            accepted: asyncio.Queue[Connection] = asyncio.Queue()

            async def handler(connection: Connection) -> None:
                accepted.put_nowait(connection)
                await asyncio.Event().wait()

            listener = await listen("tcp://127.0.0.1:0", handler, limits)
            stack.push_async_callback(listener.aclose)
            port = int(listener.address.rpartition(":")[2])
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return raw, await accepted.get()

        yield open_raw


def framed(payload: bytes) -> bytes:
    return HEADER.pack(MAGIC, len(payload)) + payload


def reset(raw: socket.socket) -> None:
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def read_exactly(raw: socket.socket, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes and (piece := raw.recv(nbytes - len(data))):
        data += piece
    return bytes(data)


async def arrived(connection: Connection, nbytes: int) -> None:
    await settled(lambda: connection.counters.received_nbytes >= nbytes)


# What arrives


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"G", b"\x16\x03\x01"])
async def test_garbage_on_the_port(open_raw: OpenRaw, garbage: bytes) -> None:
    raw, connection = await open_raw()
    raw.sendall(garbage)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="does not send PrivateLoRA frames") as caught:
            await connection.recv()
    assert repr(garbage[:16]) in str(caught.value)
    assert f"tcp://127.0.0.1:{raw.getsockname()[1]}" in str(caught.value)
    with pytest.raises(ConnectionClosed):
        await connection.send(b"anything")
    with pytest.raises(ConnectionResetError):
        raw.recv(1)


async def test_frames_before_garbage_are_delivered(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.sendall(framed(b"one") + framed(b"") + b"garbage")
    assert await received(connection) == b"one"
    assert await received(connection) == b""
    with pytest.raises(RemoteProtocolError, match="garbage"):
        await connection.recv()


@pytest.mark.parametrize("at", range(1, len(framed(b"ab") + framed(b"") + framed(b"c" * 9))))
async def test_stream_split_at_every_byte(open_raw: OpenRaw, at: int) -> None:
    raw, connection = await open_raw()
    stream = framed(b"ab") + framed(b"") + framed(b"c" * 9)
    receiving = asyncio.create_task(connection.recv())
    raw.sendall(stream[:at])
    await arrived(connection, at)
    raw.sendall(stream[at:])
    frames = [bytes(await receiving), await received(connection), await received(connection)]
    assert frames == [b"ab", b"", b"c" * 9]


async def test_a_large_frame_in_pieces(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    payload = bytes(range(256)) * 1024
    stream = framed(b"before") + framed(payload) + framed(b"after")
    receiving = asyncio.create_task(connection.recv())
    sent = 0
    for size in (3, 10, 20, 7_000, 100_000, len(stream)):
        raw.sendall(stream[sent : sent + size])
        sent = min(sent + size, len(stream))
        await arrived(connection, sent - len(framed(b"after")))
    assert bytes(await receiving) == b"before"
    assert await received(connection) == payload
    assert await received(connection) == b"after"


@pytest.mark.parametrize(
    "stream",
    [
        *(framed(b"abc")[:size] for size in (1, 7, 8, 10)),
        *(framed(bytes(100_000))[:size] for size in (50, 20_000, 100_007)),
    ],
)
async def test_end_in_mid_frame(open_raw: OpenRaw, stream: bytes) -> None:
    raw, connection = await open_raw()
    raw.sendall(framed(b"whole") + stream)
    raw.shutdown(socket.SHUT_WR)
    assert await received(connection) == b"whole"
    for _ in range(2):
        with pytest.raises(ConnectionClosed, match="cut off a frame"):
            await connection.recv()


async def test_end_between_frames(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.sendall(framed(b"whole"))
    raw.shutdown(socket.SHUT_WR)
    assert await received(connection) == b"whole"
    with pytest.raises(ConnectionClosed, match=r"closed the connection$"):
        await connection.recv()


@pytest.mark.parametrize("declared", [MIB + 1, 2**32 - 1])
async def test_declared_length_over_the_limit_allocates_nothing(
    open_raw: OpenRaw, declared: int
) -> None:
    raw, connection = await open_raw(Limits(max_frame_nbytes=MIB))
    receiving = asyncio.create_task(connection.recv())
    await asyncio.sleep(0)
    tracemalloc.start()
    try:
        raw.sendall(HEADER.pack(MAGIC, declared))
        with pytest.raises(RemoteProtocolError, match=f"{declared} bytes"):
            await receiving
        assert tracemalloc.get_traced_memory()[1] < MIB // 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize("rest", [b"", framed(bytes(200_000))[:150_000]])
async def test_reset_after_a_burst(open_raw: OpenRaw, waiting: bool, rest: bytes) -> None:
    """Data and the reset may be announced in one event, and are then announced only once."""
    raw, connection = await open_raw(Limits())
    receiving = asyncio.create_task(connection.recv())
    if waiting:
        await asyncio.sleep(0)
    raw.sendall(framed(bytes(70_000)) + rest)
    reset(raw)
    frames = []
    with contextlib.suppress(ConnectionClosed):
        frames.append(bytes(await receiving))
        while True:
            frames.append(await received(connection))
    assert frames in ([], [bytes(70_000)])


# What leaves


async def test_wire_format(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    await connection.send(b"ab", b"", b"cde")
    assert raw.recv(100) == b"PLR1" + (5).to_bytes(4, "little") + b"abcde"
    await connection.send()
    assert raw.recv(100) == b"PLR1" + bytes(4)
    assert connection.counters.sent_nbytes == 5 + 8 + 8


async def test_small_frames_leave_without_the_loop(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    with pytest.raises(StopIteration):
        connection.send(b"now").send(None)
    assert raw.recv(100) == framed(b"now")


async def test_arrived_bytes_are_received_without_the_loop(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.sendall(framed(b"here"))
    with pytest.raises(StopIteration) as done:
        connection.recv().send(None)
    assert bytes(done.value.value) == b"here"


async def test_a_spinning_receiver_does_not_suspend(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw(Limits(spin_s=20))
    started = threading.Event()

    def answer() -> None:
        started.wait()
        raw.sendall(framed(b"answer"))
        raw.shutdown(socket.SHUT_WR)

    answering = asyncio.create_task(asyncio.to_thread(answer))
    await asyncio.sleep(0)
    started.set()
    with pytest.raises(StopIteration) as done:
        connection.recv().send(None)
    assert bytes(done.value.value) == b"answer"
    with pytest.raises(ConnectionClosed):
        connection.recv().send(None)
    await answering


async def test_no_spinning_by_default(open_raw: OpenRaw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(AdaptiveSpin, "until")
    raw, connection = await open_raw(Limits())
    receiving = asyncio.create_task(connection.recv())
    await asyncio.sleep(0)
    raw.sendall(framed(b"later"))
    assert bytes(await receiving) == b"later"


async def test_a_receiver_that_spun_in_vain_waits(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw(Limits(spin_s=0.0001))
    for number in range(3):
        receiving = asyncio.create_task(connection.recv())
        await asyncio.sleep(0)
        raw.sendall(framed(bytes([number])))
        assert bytes(await receiving) == bytes([number])


async def test_sending_after_the_peer_ended_its_direction(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionClosed):
        await connection.recv()
    payload = bytes(range(256)) * 2**14
    reading = asyncio.create_task(asyncio.to_thread(read_exactly, raw, len(framed(payload)) + 100))
    await connection.send(payload)
    await connection.aclose()
    assert await reading == framed(payload)


async def test_large_frame_to_a_slow_reader(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
    parts = [bytes([number]) * 400_003 for number in range(40)]
    sender = await blocked(connection.send(*parts))
    stream = framed(b"".join(parts))
    assert await asyncio.to_thread(read_exactly, raw, len(stream)) == stream
    await sender
    assert connection.counters.sent_nbytes == len(stream)


async def test_close_survives_a_flood(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw(Limits(close_timeout_s=0.2))

    def flood() -> None:
        while True:
            raw.sendall(bytes(MIB))

    flooding = asyncio.create_task(asyncio.to_thread(flood))
    async with asyncio.timeout(5):
        await connection.aclose()
    with pytest.raises(ConnectionError):
        await flooding


async def test_last_words_survive_a_failed_send(open_raw: OpenRaw) -> None:
    """A peer that says why and leaves can still be heard after our own send has failed."""
    raw, connection = await open_raw()
    raw.sendall(framed(b"because"))
    raw.close()
    with pytest.raises(ConnectionClosed):
        await send_for_ever(connection)
    assert await received(connection) == b"because"
    with pytest.raises(ConnectionClosed):
        await connection.recv()


async def test_close_after_a_reset_behind_frames(open_raw: OpenRaw) -> None:
    """uvloop has told of the reset by then, and gives up its own handle on the socket."""
    raw, connection = await open_raw()
    raw.sendall(framed(b"one") + framed(b"two"))
    reset(raw)
    await settled(lambda: connection.counters.received_frames == 2)
    for _ in range(10):
        await asyncio.sleep(0)
    await connection.aclose()
