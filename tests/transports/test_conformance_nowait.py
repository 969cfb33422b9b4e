"""What every transport must do when it is asked for a frame without waiting."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from privatelora.errors import ConnectionClosed, LocalProtocolError, RemoteProtocolError
from privatelora.transports.base import Buffer, Connection, Limits
from tests.transports.conftest import OpenPair
from tests.transports.support import SMALL_QUEUE, received, settled

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")


async def taken(connection: Connection) -> memoryview:
    """The next frame, by looking again and again."""
    frames: list[memoryview] = []

    def look() -> bool:
        if (frame := connection.recv_nowait()) is not None:
            frames.append(frame)
        return bool(frames)

    await settled(look)
    return frames[0]


async def found(connection: Connection) -> bytes:
    return bytes(await taken(connection))


async def test_frames_are_found_in_order(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    assert server.recv_nowait() is None
    frames = [b"first", b"", b"x" * 100_000, b"last"]
    for frame in frames:
        await client.send(frame)
    assert [await found(server) for _ in frames] == frames
    assert server.recv_nowait() is None
    assert server.counters.received_frames == len(frames)


async def test_what_came_with_the_frame_before_it_is_there_at_once(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    for number in range(20):
        await client.send(bytes([number]))
    await settled(lambda: client.counters.sent_frames == 20)
    numbers = [*await received(server)]
    while len(numbers) < 20:
        while (frame := server.recv_nowait()) is not None:
            numbers += frame
        await asyncio.sleep(0)
    assert numbers == list(range(20))


async def test_both_ways_of_receiving_may_be_mixed(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    for number in range(200):
        await client.send(bytes([number]), bytes(number))
    for number in range(200):
        frame = await (received(server) if number % 3 else found(server))
        assert frame == bytes([number]) + bytes(number)


async def test_the_frame_is_the_callers(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    for _ in range(2):
        await client.send(b"mine")
    frames = [await taken(server), await taken(server)]
    frames[0][:] = b"wild"
    server.abort()
    assert [bytes(frame) for frame in frames] == [b"wild", b"mine"]


async def test_it_is_refused_while_another_task_receives(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    waiting = asyncio.create_task(server.recv())
    await asyncio.sleep(0)
    with pytest.raises(LocalProtocolError, match="two tasks"):
        server.recv_nowait()
    await client.send(b"for the one that waits")
    assert bytes(await waiting) == b"for the one that waits"
    assert server.recv_nowait() is None


async def test_taking_frames_makes_room(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)

    async def send_all() -> None:
        for number in range(300):
            await client.send(number.to_bytes(2, "little"), bytes(number * 37))

    sender = asyncio.create_task(send_all())
    for number in range(300):
        assert await found(server) == number.to_bytes(2, "little") + bytes(number * 37)
    await sender


async def test_the_peers_end_is_for_recv_to_tell(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    await client.send(b"last words")
    closing = asyncio.create_task(client.aclose())
    assert await found(server) == b"last words"
    for _ in range(2):
        assert server.recv_nowait() is None
        with pytest.raises(ConnectionClosed):
            await server.recv()
    await server.aclose()
    await closing


@pytest.mark.parametrize("in_order", [True, False])
async def test_nothing_is_found_after_this_end(open_pair: OpenPair, in_order: bool) -> None:
    client, server = await open_pair()
    for _ in range(3):
        await client.send(b"too late")
    await server.recv()
    if in_order:
        closing = asyncio.create_task(server.aclose())
        await asyncio.sleep(0)
        assert server.recv_nowait() is None
        await client.aclose()
        await closing
    else:
        server.abort()
        assert server.recv_nowait() is None
    with pytest.raises(ConnectionClosed):
        await server.recv()


async def test_a_breach_is_for_recv_to_tell(open_pair: OpenPair) -> None:
    client, server = await open_pair(Limits(), Limits(max_frame_nbytes=1000))
    await client.send(b"fine")
    with contextlib.suppress(ConnectionClosed):
        await client.send(b"x" * 1001)
    assert await found(server) == b"fine"
    with pytest.raises(RemoteProtocolError, match="1001 bytes"):
        await server.recv()
    assert server.recv_nowait() is None


def test_a_connection_that_cannot_look_finds_nothing() -> None:
    class Blind(Connection):
        @property
        def peer(self) -> str:
            return "somebody"

        async def send(self, *parts: Buffer) -> None:
            raise NotImplementedError

        async def recv(self) -> memoryview:
            raise NotImplementedError

        async def aclose(self) -> None:
            raise NotImplementedError

        def abort(self) -> None:
            raise NotImplementedError

    assert Blind().recv_nowait() is None
