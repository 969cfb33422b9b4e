"""What every transport must do, on every event loop: frames, flow and limits.

New transports join in cases.py; closing and listening are in test_conformance_endings.py.
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import random

import pytest

from privatelora.errors import (
    ConfigError,
    ConnectionClosed,
    LocalProtocolError,
    RemoteProtocolError,
)
from privatelora.transports.base import Buffer, Connection, Limits
from tests.transports.cases import Case
from tests.transports.conftest import OpenPair
from tests.transports.support import HUGE, MIB, SMALL_QUEUE, blocked, cancel, received, settled

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

# Frames


async def test_frames_arrive_in_order_with_their_boundaries(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    frames = [b"first", b"", b"\x00" * 768, b"PLR1", b"", b"last"]
    for frame in frames:
        await client.send(frame)
    assert [await received(server) for _ in frames] == frames


async def test_both_directions(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    for number in range(100):
        await client.send(b"ping", bytes([number]))
        assert await received(server) == b"ping" + bytes([number])
        await server.send(b"pong", bytes([number]))
        assert await received(client) == b"pong" + bytes([number])


async def test_many_small_frames(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    count = 20_000

    async def send_all() -> None:
        for number in range(count):
            await client.send(number.to_bytes(4, "little"), b"x" * (number % 50))

    sender = asyncio.create_task(send_all())
    for number in range(count):
        assert await received(server) == number.to_bytes(4, "little") + b"x" * (number % 50)
    await sender


@pytest.mark.parametrize("nbytes", [16 * 1024 - 8, 16 * 1024 + 1, 64 * 1024, 100_003, 20 * MIB])
async def test_large_frames(open_pair: OpenPair, nbytes: int) -> None:
    client, server = await open_pair()
    frame = random.Random(nbytes).randbytes(nbytes)
    for _ in range(2):
        sender = asyncio.create_task(client.send(b"small"))
        large_sender = asyncio.create_task(client.send(frame))
        assert await received(server) == b"small"
        assert await received(server) == frame
        await asyncio.gather(sender, large_sender)


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (b"",),
        (b"", b"a", b""),
        (b"a", bytearray(b"b"), memoryview(b"xcdx")[1:3], b"" * 5, b"e" * 1000),
        (memoryview(array.array("f", [1.5, -2.0])), memoryview(array.array("f"))),
        (memoryview(b"abcdef").cast("B", (2, 3)),),
        tuple(bytes([number % 256]) for number in range(5000)),
        (b"h" * 20, b"p" * (3 * MIB), b"", b"t" * MIB),
        (memoryview((ctypes.c_float * 3 * 0)()), b"p" * (8 * MIB)),
    ],
    ids=["none", "empty", "empties", "mixed", "floats", "2d", "5000 parts", "large", "no rows"],
)
async def test_parts_are_concatenated(open_pair: OpenPair, parts: tuple[Buffer, ...]) -> None:
    client, server = await open_pair()
    sender = asyncio.create_task(client.send(*parts))
    assert await received(server) == b"".join(bytes(part) for part in parts)
    await sender


async def test_large_parts_with_nobody_reading_yet(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    await client.send(b"first" * 20_000)
    parts = [bytes([number % 256]) * 30_011 for number in range(2000)]
    sender = await blocked(client.send(*parts))
    assert await received(server) == b"first" * 20_000
    assert await received(server) == b"".join(parts)
    await sender


async def test_neither_end_sees_the_others_memory(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    memory = bytearray(b"original")
    await client.send(memory)
    memory[:] = b"changed!"
    frame = await server.recv()
    assert bytes(frame) == b"original"
    frame[:] = b"mine now"
    await client.send(memory)
    assert await received(server) == b"changed!"
    assert (bytes(frame), bytes(memory)) == (b"mine now", b"changed!")


async def test_a_received_frame_outlives_the_connection(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    for _ in range(3):
        await client.send(b"keep" * 100)
    kept = [await server.recv() for _ in range(3)]
    client.abort()
    server.abort()
    assert [bytes(frame) for frame in kept] == [b"keep" * 100] * 3


async def test_strided_memory_is_refused_and_harmless(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    with pytest.raises(LocalProtocolError, match="strided"):
        await client.send(b"a", memoryview(b"abcdef")[::2])
    await client.send(b"still works")
    assert await received(server) == b"still works"


async def test_counters_agree(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    sizes = [0, 1, 768, 100_000]
    for size in sizes:
        await client.send(b"x" * size)
        await server.recv()
    await server.send(b"answer")
    await client.recv()
    assert client.counters.sent_frames == server.counters.received_frames == len(sizes)
    assert client.counters.sent_nbytes == server.counters.received_nbytes >= sum(sizes)
    assert server.counters.sent_frames == client.counters.received_frames == 1
    assert server.counters.sent_nbytes == client.counters.received_nbytes >= 6


async def test_peer_is_named(open_pair: OpenPair, case: Case) -> None:
    client, server = await open_pair()
    assert client.peer.startswith(f"{case.scheme}://")
    assert server.peer.startswith(f"{case.scheme}://")


# Concurrency


async def test_concurrent_senders_both_ways(open_pair: OpenPair) -> None:
    client, server = await open_pair(Limits(max_queued_nbytes=MIB))
    num_senders, num_frames = 8, 40

    async def send_all(connection: Connection, sender: int) -> None:
        rng = random.Random(sender)
        for number in range(num_frames):
            size = rng.choice([0, 10, 1000, 70_000, 400_000])
            await connection.send(bytes([sender, number]), bytes([sender ^ number]) * size)

    async def receive_all(connection: Connection) -> None:
        next_number = [0] * num_senders
        for _ in range(num_senders * num_frames):
            frame = await connection.recv()
            sender, number = frame[0], frame[1]
            assert number == next_number[sender]
            next_number[sender] += 1
            assert frame[2:] == bytes([sender ^ number]) * (len(frame) - 2)

    async with asyncio.TaskGroup() as group:
        for connection in (client, server):
            group.create_task(receive_all(connection))
            for sender in range(num_senders):
                group.create_task(send_all(connection, sender))


async def test_waiting_sends_go_out_in_the_order_of_the_calls(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    await client.send(bytes(HUGE))
    senders = [await blocked(client.send(bytes(HUGE)))]
    for number in range(10):
        senders.append(asyncio.create_task(client.send(bytes([number]))))
        await asyncio.sleep(0)
    assert len(await server.recv()) == HUGE
    assert len(await server.recv()) == HUGE
    assert [await received(server) for _ in range(10)] == [bytes([n]) for n in range(10)]
    await asyncio.gather(*senders)


async def test_second_receiver_is_refused(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    first = asyncio.create_task(server.recv())
    await asyncio.sleep(0)
    with pytest.raises(LocalProtocolError, match="two tasks"):
        await server.recv()
    await client.send(b"for the first")
    assert bytes(await first) == b"for the first"


async def test_recv_does_not_suspend_when_a_frame_is_there(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    await client.send(b"one")
    await client.send(b"two")
    assert await received(server) == b"one"
    await settled(lambda: server.counters.received_frames == 2)
    with pytest.raises(StopIteration) as done:
        server.recv().send(None)
    assert bytes(done.value.value) == b"two"


@pytest.mark.parametrize("num_steps", range(6))
async def test_cancelled_recv_loses_nothing(open_pair: OpenPair, num_steps: int) -> None:
    client, server = await open_pair()
    numbers = []
    for number in range(10):
        receiving = asyncio.create_task(server.recv())
        await asyncio.sleep(0)
        await client.send(bytes([number]), bytes(20_000 * (number % 2)))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        receiving.cancel()
        [outcome] = await asyncio.gather(receiving, return_exceptions=True)
        if isinstance(outcome, memoryview):
            numbers.append(outcome[0])
    while len(numbers) < 10:
        numbers.append((await server.recv())[0])
    assert numbers == list(range(10))


async def test_recv_with_timeout_can_be_repeated(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await server.recv()
    await client.send(b"late")
    assert await received(server) == b"late"


async def test_cancelled_send_in_mid_frame_aborts(open_pair: OpenPair, case: Case) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    await client.send(b"a" * HUGE)
    await cancel(await blocked(client.send(b"b" * HUGE)))
    if case.cuts_frames:
        with pytest.raises(ConnectionClosed, match="aborted by this end"):
            await client.send(b"more")
        with pytest.raises(ConnectionClosed, match="aborted by this end"):
            await client.recv()
        assert await received(server) == b"a" * HUGE
        with pytest.raises(ConnectionClosed):
            await server.recv()
    else:
        sender = asyncio.create_task(client.send(b"more"))
        assert await received(server) == b"a" * HUGE
        assert await received(server) == b"more"
        await sender


async def test_cancelled_send_that_waits_its_turn_is_harmless(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    await client.send(b"a" * HUGE)
    first = await blocked(client.send(b"b" * HUGE))
    second = await blocked(client.send(b"never"))
    third = await blocked(client.send(b"c"))
    await cancel(second)
    assert (await received(server))[:1] == b"a"
    assert (await received(server))[:1] == b"b"
    assert await received(server) == b"c"
    await asyncio.gather(first, third)


# Back-pressure


async def test_sender_is_held_back_and_memory_is_bounded(open_pair: OpenPair) -> None:
    limits = Limits(max_queued_nbytes=MIB)
    client, server = await open_pair(limits)
    num_frames, frame = 256, b"x" * (MIB // 2)

    async def send_all() -> None:
        for _ in range(num_frames):
            await client.send(frame)

    sender = await blocked(send_all())
    assert server.counters.received_nbytes <= limits.max_queued_nbytes + len(frame) + 128 * 1024
    for _ in range(num_frames):
        assert await received(server) == frame
    await sender


async def test_empty_frames_fill_a_queue_too(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    count = 3_000_000

    async def send_all() -> None:
        for _ in range(count):
            await client.send()
            if client.counters.sent_frames % 1000 == 0:
                await asyncio.sleep(0)  # a send that need not wait gives way to nobody

    sender = await blocked(send_all())
    assert server.counters.received_frames < 1000
    for _ in range(2000):
        assert await received(server) == b""
    await cancel(sender)


async def test_slow_reader_gets_everything(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)

    async def send_all() -> None:
        for number in range(300):
            await client.send(number.to_bytes(2, "little"), bytes(number * 37))

    sender = asyncio.create_task(send_all())
    for number in range(300):
        for _ in range(number % 7):
            await asyncio.sleep(0)
        assert await received(server) == number.to_bytes(2, "little") + bytes(number * 37)
    await sender


async def test_a_frame_above_the_queue_limit_is_accepted(open_pair: OpenPair) -> None:
    client, server = await open_pair(Limits(max_queued_nbytes=1))
    for size in (0, 1, 5 * MIB):
        sender = asyncio.create_task(client.send(bytes(size)))
        assert len(await server.recv()) == size
        await sender


async def test_other_direction_works_while_one_is_blocked(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    await client.send(bytes(HUGE))
    sender = await blocked(client.send(bytes(HUGE)))
    for number in range(100):
        await server.send(bytes([number]) * 768)
        assert await received(client) == bytes([number]) * 768
    await server.recv()
    await server.recv()
    await sender


# Limits


async def test_own_limit_refuses_an_outgoing_frame(open_pair: OpenPair) -> None:
    client, server = await open_pair(Limits(max_frame_nbytes=1000), Limits())
    with pytest.raises(LocalProtocolError, match=r"1001 bytes .* limit of 1000"):
        await client.send(b"x" * 1000, b"y")
    await client.send(b"z" * 1000)
    assert await received(server) == b"z" * 1000


async def test_oversized_incoming_frame_breaks_the_connection(open_pair: OpenPair) -> None:
    client, server = await open_pair(Limits(), Limits(max_frame_nbytes=1000))
    await client.send(b"fine")
    await client.send(b"x" * 1001)
    assert await received(server) == b"fine"
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="1001 bytes"):
            await server.recv()
    with pytest.raises(ConnectionClosed):
        await server.send(b"more")
    with pytest.raises(ConnectionClosed):
        await client.recv()
    await server.aclose()


@pytest.mark.parametrize(
    "field", ["max_frame_nbytes", "max_queued_nbytes", "connect_timeout_s", "close_timeout_s"]
)
def test_limits_must_be_positive(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Limits(**{field: 0})


def test_spinning_may_be_off_but_not_negative() -> None:
    assert Limits(spin_s=0).spin_s == 0
    with pytest.raises(ConfigError, match="spin_s"):
        Limits(spin_s=-0.001)


def test_frame_limit_must_fit_the_header() -> None:
    with pytest.raises(ConfigError, match="max_frame_nbytes"):
        Limits(max_frame_nbytes=2**32)
