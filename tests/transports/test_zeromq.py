"""What only ZeroMQ has: threads that notice death, descriptors of links, shared sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import threading
import time

import pytest
import zmq

from privatelora.errors import (
    ConnectError,
    ConnectionClosed,
)
from privatelora.transports import zeromq_sockets
from privatelora.transports.base import Connection, Limits
from privatelora.transports.flow import AdaptiveSpin
from privatelora.transports.registry import connect, listen
from privatelora.transports.zeromq_protocol import ACCEPT, greeting
from tests.transports.relay import Relay
from tests.transports.support import (
    MIB,
    SMALL_QUEUE,
    blocked,
    cancel,
    echo,
    echoes,
    received,
    settled,
)
from tests.transports.zeromq_peer import LAST_WORDS, output_line, running
from tests.transports.zeromq_raw import Accepting, raw_client

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

ANYWHERE = "zmq+tcp://127.0.0.1:0"

# Death


@pytest.mark.parametrize(
    "address", [ANYWHERE, f"zmq+ipc://killed-{os.getpid()}"], ids=("tcp", "ipc")
)
async def test_a_killed_client_is_noticed_and_its_last_words_heard(address: str) -> None:
    accepting = await Accepting.on(address, Limits())
    async with accepting.listener as listener:
        with running("talk", listener.address) as process:
            connection = await accepting.connections.get()
            await connection.send(bytes(MIB))
            sender = await blocked(connection.send(b"more"))
            await settled(lambda: connection.counters.received_frames == len(LAST_WORDS))
            process.kill()
            for frame in LAST_WORDS:
                assert await received(connection) == frame
            async with asyncio.timeout(zeromq_sockets.HEARTBEAT_S / 2):
                with pytest.raises(ConnectionClosed, match="lost"):
                    await connection.recv()
                with pytest.raises(ConnectionClosed, match="lost"):
                    await sender


@pytest.mark.parametrize(
    "address", [ANYWHERE, f"zmq+ipc://killed-{os.getpid()}"], ids=("tcp", "ipc")
)
async def test_a_killed_listener_is_noticed_and_its_last_words_heard(address: str) -> None:
    with running("listen", address) as process:
        connection = await connect(await output_line(process))
        await settled(lambda: connection.counters.received_frames == len(LAST_WORDS))
        process.kill()
        process.wait()
        async with await listen(ANYWHERE, echo) as other, await connect(other.address) as busy:
            await echoes(busy)
        for frame in LAST_WORDS:
            assert await received(connection) == frame
        with pytest.raises(ConnectionClosed, match="lost"):
            await connection.recv()
        connection.abort()


def num_sockets() -> int:
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(target.startswith("socket:") for target in targets)


def wait_for_num_sockets(expected: int) -> None:
    """While the event loop stands still, ZeroMQ's threads go on."""
    deadline = time.monotonic() + 10
    while num_sockets() != expected:
        assert time.monotonic() < deadline


async def test_what_arrived_outlives_the_client() -> None:
    """It is still there when the client is known to be gone but nobody has looked yet."""
    accepting = await Accepting.on(ANYWHERE, Limits())
    async with accepting.listener as listener:
        alone = num_sockets()
        with raw_client(listener.address) as raw:
            await raw.open()
            connection = await accepting.connections.get()
            raw.send(*[b"\x04" + frame for frame in LAST_WORDS])
            raw.socket.setsockopt(zmq.LINGER, 10_000)
        wait_for_num_sockets(alone)
        for frame in LAST_WORDS:
            assert await received(connection) == frame
        with pytest.raises(ConnectionClosed, match="lost"):
            await connection.recv()


async def test_what_arrived_outlives_the_listener() -> None:
    alone = num_sockets()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        opening = asyncio.create_task(connect(f"zmq+tcp://127.0.0.1:{port}"))
        await settled(lambda: bool(router.poll(0)))
        routing_id, _open = router.recv_multipart()
        router.send_multipart([routing_id, greeting(ACCEPT, bytes(16), MIB)])
        connection = await opening
        for frame in LAST_WORDS:
            router.send_multipart([routing_id, b"\x04" + frame])
    wait_for_num_sockets(alone)
    for frame in LAST_WORDS:
        assert await received(connection) == frame
    with pytest.raises(ConnectionClosed, match="lost"):
        await connection.recv()
    connection.abort()


@pytest.fixture
def short_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeromq_sockets, "HEARTBEAT_S", 0.2)


@pytest.mark.usefixtures("short_heartbeat")
async def test_a_client_that_stands_still_is_noticed() -> None:
    accepting = await Accepting.on(ANYWHERE, Limits())
    async with accepting.listener as listener:
        with running("talk", listener.address) as process:
            connection = await accepting.connections.get()
            for frame in LAST_WORDS:
                assert await received(connection) == frame
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(ConnectionClosed, match="lost"):
                await connection.recv()


@pytest.mark.usefixtures("short_heartbeat")
async def test_a_listener_that_stands_still_is_noticed() -> None:
    with running("listen", ANYWHERE) as process:
        connection = await connect(await output_line(process))
        for frame in LAST_WORDS:
            assert await received(connection) == frame
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConnectionClosed, match="lost"):
            await connection.recv()
        connection.abort()


@pytest.mark.usefixtures("short_heartbeat")
async def test_a_client_that_is_merely_idle_stays() -> None:
    async with (
        await listen(ANYWHERE, echo) as listener,
        await connect(listener.address) as connection,
    ):
        await echoes(connection)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await connection.recv()
        await echoes(connection)


@pytest.mark.usefixtures("short_heartbeat")
async def test_a_busy_event_loop_loses_no_connection() -> None:
    """However much has arrived meanwhile, ZeroMQ must go on reading the answers to heartbeats."""
    accepting = await Accepting.on(ANYWHERE, Limits())
    async with accepting.listener as listener:
        client = await connect(listener.address)
        server = await accepting.connections.get()
        senders = [
            asyncio.create_task(send_numbers(end, sender, 1000))
            for end, sender in ((client, 1), (server, 2))
        ]
        await asyncio.sleep(0)
        compute_for(5 * zeromq_sockets.HEARTBEAT_S)
        for end, sender in ((client, 2), (server, 1)):
            for number in range(1000):
                assert await received(end) == bytes([sender]) + number.to_bytes(2, "little")
        await asyncio.gather(*senders)
        client.abort()


async def send_numbers(connection: Connection, sender: int, count: int) -> None:
    for number in range(count):
        await connection.send(bytes([sender]), number.to_bytes(2, "little"))


def compute_for(duration_s: float) -> None:
    deadline = time.monotonic() + duration_s
    while time.monotonic() < deadline:
        pass


async def test_a_used_descriptor_does_not_end_its_next_owner() -> None:
    async with await listen(ANYWHERE, echo) as listener:
        for _ in range(30):
            first = await connect(listener.address)
            await echoes(first)
            first.abort()
            async with await connect(listener.address) as second:
                for _ in range(5):
                    await echoes(second)


# Flow


async def test_a_stuck_connection_does_not_delay_another() -> None:
    stuck: list[Connection] = []

    async def handler(connection: Connection) -> None:
        if await received(connection) == b"echo":
            await echo(connection)
        stuck.append(connection)
        await connection.send(bytes(20 * MIB))
        await asyncio.Event().wait()

    async with await listen(ANYWHERE, handler, SMALL_QUEUE) as listener:
        slow = await connect(listener.address, SMALL_QUEUE)
        await slow.send(b"get stuck")
        await slow.send(bytes(20 * MIB))
        sender = await blocked(slow.send(bytes(20 * MIB)))
        async with await connect(listener.address) as quick:
            await quick.send(b"echo")
            for size in (0, 768, 5 * MIB):
                await echoes(quick, bytes(size))
        assert stuck
        assert not sender.done()
        slow.abort()
        with pytest.raises(ConnectionClosed):
            await sender


async def test_arrived_frames_are_received_without_the_loop() -> None:
    accepting = await Accepting.on(ANYWHERE, Limits())
    async with accepting.listener as listener:
        with raw_client(listener.address) as raw:
            await raw.open()
            connection = await accepting.connections.get()
            raw.send(b"\x04here")
            frame = receive_without_the_loop(connection)
    assert frame == b"here"


def receive_without_the_loop(connection: Connection) -> bytes:
    """Try until the frame is there; each time that it is not, recv is cut off."""
    while True:
        receiving = connection.recv()
        try:
            receiving.send(None)
        except StopIteration as done:
            return bytes(done.value)
        receiving.close()


async def test_a_spinning_receiver_does_not_suspend() -> None:
    accepting = await Accepting.on(ANYWHERE, Limits(spin_s=20))
    async with accepting.listener as listener:
        with raw_client(listener.address) as raw:
            await raw.open()
            connection = await accepting.connections.get()
            timer = threading.Timer(0.05, raw.send, [b"\x04answer"])
            timer.start()
            with pytest.raises(StopIteration) as done:
                connection.recv().send(None)
            assert bytes(done.value.value) == b"answer"
            timer.join()


async def test_no_spinning_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(AdaptiveSpin, "until")
    async with (
        await listen(ANYWHERE, echo) as listener,
        await connect(listener.address) as connection,
    ):
        await echoes(connection)


async def test_counters_tell_what_is_on_the_wire() -> None:
    accepting = await Accepting.on(ANYWHERE, Limits())
    async with accepting.listener as listener:
        with Relay(int(listener.address.rpartition(":")[2])) as wire:
            connection = await connect(f"zmq+tcp://127.0.0.1:{wire.port}")
            server = await accepting.connections.get()
            before = len(wire.up)
            for size in (0, 1, 254, 255, 256, 768, 100_000, 300_000):
                await connection.send(bytes(size))
                assert len(await server.recv()) == size
            assert connection.counters.sent_nbytes == len(wire.up) - before
            connection.abort()


async def test_cancelled_waiting_for_credit_is_harmless() -> None:
    accepting = await Accepting.on(ANYWHERE, SMALL_QUEUE)
    async with accepting.listener as listener:
        client = await connect(listener.address)
        await client.send(bytes(20 * MIB))
        await cancel(await blocked(client.send(bytes(20 * MIB))))
        sender = asyncio.create_task(client.send(b"next"))
        server = await accepting.connections.get()
        assert len(await server.recv()) == 20 * MIB
        assert await received(server) == b"next"
        await sender
        client.abort()


# Leaving nothing behind


@pytest.mark.parametrize("num_steps", range(12))
async def test_connecting_may_be_cancelled_at_any_time(num_steps: int) -> None:
    async with await listen(ANYWHERE, echo) as listener:
        connecting = asyncio.create_task(connect(listener.address))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        connecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await connecting).abort()
        async with await connect(listener.address) as connection:
            await echoes(connection)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_too_few_descriptors() -> None:
    """ZeroMQ itself ends the process when it cannot open what its threads need."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_descriptors() + 4, limits[1]))
    try:
        with pytest.raises(ConnectError, match=r"cannot connect to .*[Tt]oo many open files"):
            await connect("zmq+tcp://127.0.0.1:1")
        with pytest.raises(ConnectError, match=r"cannot listen on .*[Tt]oo many open files"):
            await listen(ANYWHERE, echo)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_nobody_closed_is_closed_when_it_is_collected() -> None:
    async def leave_open() -> None:
        listener = await listen(ANYWHERE, echo)
        await echoes(await connect(listener.address))

    before = num_descriptors()
    asyncio.run(leave_open())
    gc.collect()
    assert num_descriptors() == before
