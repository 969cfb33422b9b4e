"""ZeroMQ against bare sockets that do not keep the rules."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
import zmq

from privatelora.errors import ConnectionClosed, RemoteProtocolError
from privatelora.transports.base import Connection, Limits
from privatelora.transports.registry import connect, listen
from privatelora.transports.zeromq_protocol import (
    ABORT_MESSAGE,
    ACCEPT,
    BEGIN,
    CONFIRM,
    CREDIT,
    DATA,
    END_MESSAGE,
    ENDED_MESSAGE,
    FRAME_OVERHEAD_NBYTES,
    MESSAGE_OVERHEAD_NBYTES,
    OPEN_MESSAGE,
    PIECE,
    PIECE_NBYTES,
    TRANSIT_NBYTES,
    greeting,
    parse_greeting,
)
from tests.transports.support import MIB, SMALL_QUEUE, blocked, cancel, echo, received
from tests.transports.zeromq_raw import Accepting, Raw, raw_client

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

ANYWHERE = "zmq+tcp://127.0.0.1:0"

OpenRaw = Callable[..., Awaitable[tuple[Raw, Connection]]]


def data(payload: bytes) -> bytes:
    return bytes([DATA]) + payload


def begin(nbytes: int, piece: bytes = b"") -> bytes:
    return bytes([BEGIN]) + struct.pack("<Q", nbytes) + piece


def piece(payload: bytes) -> bytes:
    return bytes([PIECE]) + payload


def credit(received_nbytes: int, taken_nbytes: int) -> bytes:
    return bytes([CREDIT]) + struct.pack("<QQ", received_nbytes, taken_nbytes)


@pytest.fixture
async def open_raw() -> AsyncIterator[OpenRaw]:
    """Opens a connection with a bare client; returns it and the listener's end."""
    async with AsyncExitStack() as stack:

        async def open_raw(
            limits: Limits = SMALL_QUEUE, window_nbytes: int = MIB
        ) -> tuple[Raw, Connection]:
            accepting = await Accepting.on(ANYWHERE, limits)
            stack.push_async_callback(accepting.listener.aclose)
            raw = stack.enter_context(raw_client(accepting.listener.address))
            await raw.open(window_nbytes)
            return raw, await accepting.connections.get()

        yield open_raw


async def still_serves(address: str) -> None:
    async with await connect(address) as connection:
        await connection.send(b"well?")
        assert await received(connection) == b"well?"


# Opening


@pytest.mark.parametrize(
    "first",
    [
        [b""],
        [b"hello"],
        [b"\x00" * 100_000],
        [OPEN_MESSAGE[:-1] + b"9"],
        [OPEN_MESSAGE + b"!"],
        [greeting(CONFIRM, bytes(16), 1)],
        [data(b"frame")],
        [ABORT_MESSAGE],
        [OPEN_MESSAGE, b"second part"],
    ],
    ids=["empty", "text", "zeros", "version", "longer", "confirm", "data", "abort", "parts"],
)
async def test_not_opening_as_one_should(
    own_errors: pytest.LogCaptureFixture, first: list[bytes]
) -> None:
    async with await listen(ANYWHERE, echo) as listener:
        with raw_client(listener.address) as raw:
            raw.socket.send_multipart(first)
            await raw.aborted()
            assert f"{listener.address} refused a client: zmq+tcp://127.0.0.1" in own_errors.text
            raw.send(OPEN_MESSAGE)
            await still_serves(listener.address)
            assert not raw.has_answer()


def wrong_token(token: bytes) -> bytes:
    return greeting(CONFIRM, token[::-1], 1)


def no_window(token: bytes) -> bytes:
    return greeting(CONFIRM, token, 0)


def cut_off(token: bytes) -> bytes:
    return greeting(CONFIRM, token, 1)[:-1]


def open_again(token: bytes) -> bytes:
    return OPEN_MESSAGE


@pytest.mark.parametrize("confirm", [wrong_token, no_window, cut_off, open_again])
async def test_not_confirming_as_one_should(
    own_errors: pytest.LogCaptureFixture, confirm: Callable[[bytes], bytes]
) -> None:
    async with await listen(ANYWHERE, echo) as listener:
        with raw_client(listener.address) as raw:
            raw.send(OPEN_MESSAGE)
            token, _ = parse_greeting(memoryview(await raw.answer()), ACCEPT, "the listener")
            raw.send(confirm(token))
            await raw.aborted()
            assert f"{listener.address} refused a client" in own_errors.text
            await still_serves(listener.address)


async def test_a_routing_id_of_ones_own_is_refused() -> None:
    async with await listen(ANYWHERE, echo) as listener:
        with raw_client(listener.address, routing_id=b"other") as raw:
            raw.send(OPEN_MESSAGE)
            await raw.aborted()
            await still_serves(listener.address)


async def test_never_opening_and_leaving() -> None:
    """Descriptors that are told to be gone without ever having been a client's."""
    async with await listen(ANYWHERE, echo) as listener:
        for _ in range(5):
            with raw_client(listener.address) as raw:
                await still_serves(listener.address)
                assert not raw.has_answer()
        await still_serves(listener.address)


async def test_leaving_before_the_listener_looks() -> None:
    """One that is gone before it was noted, and the next, which gets the same descriptor."""
    num_started = 0

    async def count_and_echo(connection: Connection) -> None:
        nonlocal num_started
        num_started += 1
        await echo(connection)

    async with await listen(ANYWHERE, count_and_echo) as listener:
        for number in range(5):
            with raw_client(listener.address) as gone:
                # Leaving waits until this was sent; meanwhile the event loop stands still.
                gone.socket.setsockopt(zmq.LINGER, 10_000)
                gone.send(OPEN_MESSAGE)
            with raw_client(listener.address) as raw:
                await raw.open()
                raw.send(data(b"hello"))
                assert await raw.answer() == data(b"hello")
            assert num_started == number + 1


# Inside a connection


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([b""], "inside a connection"),
        ([b"\x63odd"], "inside a connection"),
        ([b"\x00"], "inside a connection"),
        ([OPEN_MESSAGE], "inside a connection"),
        ([greeting(CONFIRM, bytes(16), 1)], "inside a connection"),
        ([piece(b"x")], "mixed up the pieces"),
        ([begin(10, b"x"), data(b"y")], "mixed up the pieces"),
        ([begin(10, b"x"), begin(10, b"y")], "mixed up the pieces"),
        ([begin(10)[:-1]], "cut off the length"),
        ([begin(10)], "does not fit"),
        ([begin(0)], "does not fit"),
        ([begin(3, b"four")], "does not fit"),
        ([begin(10, b"x"), piece(b"")], "does not fit"),
        ([begin(10, b"x"), piece(b"x" * 10)], "does not fit"),
        ([begin(10, b"x"), END_MESSAGE], "its end inside a frame"),
        ([END_MESSAGE + b"x"], "inside a connection"),
        ([ENDED_MESSAGE], "inside a connection"),
        ([credit(0, 0)[:-1]], "a credit that cannot be"),
        ([credit(1, 0)], "a credit that cannot be"),
        ([credit(0, 1)], "a credit that cannot be"),
        ([credit(2**64 - 1, 2**64 - 1)], "a credit that cannot be"),
    ],
)
async def test_breaking_the_rules(open_raw: OpenRaw, messages: list[bytes], complaint: str) -> None:
    raw, connection = await open_raw()
    raw.send(data(b"fine"), *messages, data(b"too late"))
    assert await received(connection) == b"fine"
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match=complaint) as caught:
            await connection.recv()
        assert connection.peer in str(caught.value)
    with pytest.raises(ConnectionClosed):
        await connection.send(b"anything")
    await raw.aborted()
    await connection.aclose()


@pytest.mark.parametrize("messages", [[END_MESSAGE], [data(b"more")], [begin(10, b"x")]])
async def test_going_on_after_the_end(open_raw: OpenRaw, messages: list[bytes]) -> None:
    raw, connection = await open_raw()
    raw.send(END_MESSAGE, *messages)
    with pytest.raises(ConnectionClosed, match="closed the connection"):
        await connection.recv()
    assert await raw.answer() == ENDED_MESSAGE
    await raw.aborted()
    with pytest.raises(ConnectionClosed, match="was aborted"):
        await connection.send(b"anything")


async def test_a_message_in_several_parts(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    raw.socket.send_multipart([data(b"one"), data(b"two")])
    with pytest.raises(RemoteProtocolError, match="several parts"):
        await connection.recv()
    await raw.aborted()


async def test_credit_that_goes_back(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    await connection.send(b"x" * 100)
    assert await raw.answer() == data(b"x" * 100)
    raw.send(credit(50, 50), credit(49, 50))
    with pytest.raises(RemoteProtocolError, match="a credit that cannot be"):
        await connection.recv()


async def test_sending_without_credit(open_raw: OpenRaw) -> None:
    """What had room is delivered; the rest is not even kept."""
    raw, connection = await open_raw(Limits(max_queued_nbytes=10_000))
    raw.send(*[data(bytes([number]) * 1000) for number in range(100)])
    await raw.aborted()
    for number in range(8):
        assert await received(connection) == bytes([number]) * 1000
    with pytest.raises(RemoteProtocolError, match="ignoring its credit"):
        await connection.recv()


@pytest.mark.parametrize("declared", [MIB + 1, 2**32, 2**64 - 1])
async def test_declared_length_over_the_limit_allocates_nothing(
    open_raw: OpenRaw, declared: int
) -> None:
    raw, connection = await open_raw(Limits(max_frame_nbytes=MIB))
    receiving = asyncio.create_task(connection.recv())
    await asyncio.sleep(0)
    tracemalloc.start()
    try:
        raw.send(begin(declared, b"first"))
        with pytest.raises(RemoteProtocolError, match=f"{declared} bytes"):
            await receiving
        assert tracemalloc.get_traced_memory()[1] < MIB // 4
    finally:
        tracemalloc.stop()


async def test_a_message_over_the_limit_never_gets_in(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw(Limits())
    raw.send(data(bytes(PIECE_NBYTES + 100)))
    with pytest.raises(ConnectionClosed, match="lost"):
        await connection.recv()


async def test_a_flood_does_not_hold_the_loop() -> None:
    """ZeroMQ cannot hang up on one client, so whatever it still sends has to be thrown away."""
    flooding = threading.Event()

    def flood(raw: Raw) -> None:
        while flooding.is_set():
            if raw.socket.poll(10, zmq.POLLOUT):
                raw.send(b"against the rules")

    async with await listen(ANYWHERE, echo) as listener:
        with raw_client(listener.address) as raw:
            flooding.set()
            thread = asyncio.create_task(asyncio.to_thread(flood, raw))
            for _ in range(10):
                await still_serves(listener.address)
            flooding.clear()
            await thread
            await raw.aborted()


# What leaves


async def test_wire_format(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    await connection.send(b"ab", b"", b"cde")
    assert await raw.answer() == bytes([DATA]) + b"abcde"
    await connection.send()
    assert await raw.answer() == bytes([DATA])
    raw.send(credit(2 * MESSAGE_OVERHEAD_NBYTES + 7, 2 * FRAME_OVERHEAD_NBYTES + 5))
    frame = os.urandom(2 * PIECE_NBYTES + 5)
    await connection.send(frame[:7], frame[7:])
    assert await raw.answer() == begin(len(frame), frame[:PIECE_NBYTES])
    assert await raw.answer() == piece(frame[PIECE_NBYTES : 2 * PIECE_NBYTES])
    assert await raw.answer() == piece(frame[-5:])
    assert not raw.has_answer()


async def test_small_frames_leave_without_the_loop(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw()
    with pytest.raises(StopIteration):
        connection.send(b"now").send(None)
    assert raw.socket.poll(10_000)
    assert raw.socket.recv() == data(b"now")


async def test_the_peers_window_is_respected(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw(window_nbytes=2000)
    for number in range(3):
        await connection.send(bytes([number]) * 500)
    sender = await blocked(connection.send(b"waits"))
    for number in range(3):
        assert await raw.answer() == data(bytes([number]) * 500)
    assert not raw.has_answer()
    raw.send(credit(3 * (MESSAGE_OVERHEAD_NBYTES + 501), 500 + FRAME_OVERHEAD_NBYTES))
    await sender
    assert await raw.answer() == data(b"waits")


async def test_little_is_on_its_way_whatever_the_window(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw(window_nbytes=2**64 - 1)
    frame = os.urandom(3 * TRANSIT_NBYTES)
    sender = await blocked(connection.send(frame))
    got, num_messages = (await raw.answer())[9:], 1
    while raw.has_answer():
        got += (await raw.answer())[1:]
        num_messages += 1
    assert TRANSIT_NBYTES * 0.8 < len(got) <= TRANSIT_NBYTES
    while len(got) < len(frame):
        raw.send(credit(len(got) + 8 + num_messages * (MESSAGE_OVERHEAD_NBYTES + 1), 0))
        got += (await raw.answer())[1:]
        num_messages += 1
    await sender
    assert got == frame


async def test_cancelled_send_in_mid_frame_aborts(open_raw: OpenRaw) -> None:
    raw, connection = await open_raw(window_nbytes=2**64 - 1)
    await cancel(await blocked(connection.send(bytes(3 * TRANSIT_NBYTES))))
    with pytest.raises(ConnectionClosed, match="aborted by this end"):
        await connection.send(b"more")
    with pytest.raises(ConnectionClosed, match="aborted by this end"):
        await connection.recv()
    while (message := await raw.answer()) != ABORT_MESSAGE:
        assert message[0] in (BEGIN, PIECE)
