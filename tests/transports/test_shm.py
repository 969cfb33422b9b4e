"""What only shm:// has: two processes, death, users, and peers that do not keep the rules."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol

import pytest

from privatelora.errors import (
    AuthError,
    ConfigError,
    ConnectError,
    ConnectionClosed,
    TransportTimeout,
)
from privatelora.transports import sockets
from privatelora.transports.base import Connection, Limits
from privatelora.transports.flow import AdaptiveSpin
from privatelora.transports.registry import connect, listen
from privatelora.transports.shm import DEFAULT_SPIN_S
from privatelora.transports.shm_shared import MEMORY_NBYTES, RING_NBYTES, Shared, close_all
from tests.transports import shm_peer
from tests.transports.conftest import ShmAccept
from tests.transports.support import (
    HUGE,
    SMALL_QUEUE,
    blocked,
    echo,
    received,
    send_for_ever,
    settled,
)

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

NOBODY = 65534

# Two processes


class Spawn(Protocol):
    async def __call__(self, role: str, uid: int | None = None) -> subprocess.Popen[str]: ...


@pytest.fixture
def spawn(shm_address: str) -> Iterator[Spawn]:
    """Runs shm_peer.py in a role; returns when it is ready."""
    with ExitStack() as stack:

        async def spawn(role: str, uid: int | None = None) -> subprocess.Popen[str]:
            command = shm_peer.command(shm_address, role, uid)
            process = stack.enter_context(
                subprocess.Popen(  # noqa: ASYNC220
                    command, stdout=subprocess.PIPE, text=True, cwd=shm_peer.ROOT
                )
            )
            stack.callback(process.kill)
            if role != "connect":
                assert await asyncio.to_thread(output_line, process) == "ready\n"
            return process

        yield spawn


def output_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


async def send_all(connection: Connection, frames: list[bytes]) -> None:
    for frame in frames:
        await connection.send(frame)


@pytest.mark.parametrize("role", ["echo", "echo without spinning"])
async def test_no_wake_up_is_lost_between_processes(
    shm_address: str, spawn: Spawn, role: str
) -> None:
    """Each lost one would stop this for ever. Sizes up to one that does not fit the ring."""
    await spawn(role)
    connection = await connect(shm_address, Limits(spin_s=None if role == "echo" else 0))
    rng = random.Random(0)
    sizes = [0, 1, 100, 768, 768, 768, 5_000, RING_NBYTES // 3, RING_NBYTES + 10]
    weights = [100, 100, 100, 100, 100, 100, 10, 1, 1]
    deadline = time.monotonic() + 1
    num_frames = 0
    while time.monotonic() < deadline:
        frames = [
            rng.randbytes(8) * (size // 8)
            for size in rng.choices(sizes, weights, k=rng.randint(1, 3))
        ]

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            if rng.random() < 0.5:
                group.create_task(send_all(connection, frames))
            else:
                await send_all(connection, frames)
            for frame in frames:
                assert await connection.recv() == frame
        num_frames += len(frames)
    await connection.aclose()
    assert num_frames > 100


async def test_killed_in_mid_frame(shm_address: str, spawn: Spawn, shm_accept: ShmAccept) -> None:
    accepted = await shm_accept()
    process = await spawn("get stuck")
    connection = await accepted.get()
    await connection.send(bytes(HUGE))
    sender = await blocked(connection.send(bytes(HUGE)))
    process.kill()
    started = time.monotonic()
    with pytest.raises(ConnectionClosed, match="lost: the peer died or aborted"):
        await sender
    assert len(await connection.recv()) == HUGE
    with pytest.raises(ConnectionClosed, match="lost: the peer died or aborted"):
        await connection.recv()
    assert time.monotonic() - started < 5
    assert f"{shm_address} (process {process.pid})" == connection.peer


async def test_killed_listener_leaves_its_name_free(
    shm_address: str, spawn: Spawn, shm_accept: ShmAccept
) -> None:
    process = await spawn("echo")
    connection = await connect(shm_address)
    receiving = asyncio.create_task(connection.recv())
    await asyncio.sleep(0)
    process.kill()
    with pytest.raises(ConnectionClosed, match="lost"):
        await receiving
    connection.abort()
    process.wait()
    with pytest.raises(ConnectError, match="nothing listens on this name"):
        await connect(shm_address)
    await shm_accept()
    connection = await connect(shm_address)
    connection.abort()


# Other users

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@root_only
async def test_client_of_another_user_is_refused(
    shm_address: str, spawn: Spawn, own_errors: pytest.LogCaptureFixture
) -> None:
    async with await listen(shm_address, echo):
        process = await spawn("connect", NOBODY)
        said = await asyncio.to_thread(output_line, process)
        assert said.startswith(f"AuthError cannot connect to {shm_address}: user 0 listens there")
        await settled(lambda: bool(own_errors.records))
        connection = await connect(shm_address)
        await connection.send(b"still served")
        assert await received(connection) == b"still served"
        await connection.aclose()
    [record] = own_errors.records
    assert (record.name, record.levelname) == ("privatelora.transports", "WARNING")
    assert record.message.startswith(f"{shm_address}: refused process {process.pid}: it is of user")


@root_only
async def test_listener_of_another_user_is_refused(shm_address: str, spawn: Spawn) -> None:
    """Anybody may take a name in the abstract namespace."""
    await spawn("echo", NOBODY)
    with pytest.raises(AuthError, match=f"{shm_address}: user {NOBODY} listens there"):
        await connect(shm_address)


# Closing and waking


async def test_an_orderly_end_and_a_lost_peer_read_differently(
    shm_address: str, shm_accept: ShmAccept
) -> None:
    accepted = await shm_accept()
    for end, says in ((close, r"closed the connection$"), (abort, "lost: the peer died")):
        client = await connect(shm_address)
        await client.send(b"last words")
        ending = asyncio.create_task(end(client))
        server = await accepted.get()
        assert await received(server) == b"last words"
        with pytest.raises(ConnectionClosed, match=says):
            await server.recv()
        await server.aclose()
        await ending


async def close(connection: Connection) -> None:
    await connection.aclose()


async def abort(connection: Connection) -> None:
    connection.abort()


async def test_death_is_noticed_while_not_reading(shm_address: str, shm_accept: ShmAccept) -> None:
    """The queue is full; a sender learns of it all the same."""
    accepted = await shm_accept()
    client = await connect(shm_address, SMALL_QUEUE)
    server = await accepted.get()
    await client.send(bytes(HUGE))
    await server.send(bytes(HUGE))
    sender = await blocked(server.send(bytes(HUGE)))
    client.abort()
    with pytest.raises(ConnectionClosed, match="lost"):
        await sender


async def test_closing_does_not_wait_for_the_dead(shm_address: str, shm_accept: ShmAccept) -> None:
    """The death was noticed while the queue was full, so nothing was being read."""
    accepted = await shm_accept(Limits(max_queued_nbytes=1000, close_timeout_s=20))
    client = await connect(shm_address)
    server = await accepted.get()
    await client.send(bytes(2000))
    await settled(lambda: server.counters.received_frames == 1)
    client.abort()
    with pytest.raises(ConnectionClosed):
        await send_for_ever(server)
    async with asyncio.timeout(5):
        await server.aclose()


async def test_spinning_is_the_default_and_can_be_switched_off(
    shm_address: str, shm_accept: ShmAccept, monkeypatch: pytest.MonkeyPatch
) -> None:
    spins = []
    monkeypatch.setattr(AdaptiveSpin, "until", lambda self, look: spins.append(self._spin_s))
    await shm_accept()
    for spin_s in (None, 0, 0.5):
        connection = await connect(shm_address, Limits(spin_s=spin_s))
        receiving = asyncio.create_task(connection.recv())
        await asyncio.sleep(0)
        connection.abort()
        with pytest.raises(ConnectionClosed):
            await receiving
    assert spins == [DEFAULT_SPIN_S, 0.5]


# Where it cannot work


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shm://", "expected a name"),
        ("shm://name:80", "expected a name"),
        ("shm://name/path", "expected a name"),
        ("shm://*", "not a name"),
        ("shm://name?size=3", "unknown option 'size'"),
        ("shm://" + "n" * 92, "at most 91 characters"),
    ],
)
async def test_unusable_addresses(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        await connect(text)
    with pytest.raises(ConfigError, match=says):
        await listen(text, echo)


async def test_the_longest_name(shm_address: str) -> None:
    async with await listen(shm_address.ljust(len("shm://") + 91, "n"), echo) as listener:
        (await connect(listener.address)).abort()


async def test_a_system_without_shared_memory(
    shm_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match=f"{shm_address} needs 64-bit Linux .* use tcp://"):
        await connect(shm_address)
    with pytest.raises(ConfigError, match=f"{shm_address} needs 64-bit Linux .* use tcp://"):
        await listen(shm_address, echo)


async def test_nobody_listens(shm_address: str) -> None:
    with pytest.raises(ConnectError, match=rf"{shm_address}: .*container.* use tcp://"):
        await connect(shm_address)


async def test_too_little_memory(shm_address: str, shm_accept: ShmAccept) -> None:
    await shm_accept()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ConnectError, match=rf"{shm_address}: no sealed shared .*use tcp://"):
            await connect(shm_address)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (await connect(shm_address)).abort()


def test_memory_is_there_from_the_start() -> None:
    """Otherwise a lack of it would kill whoever touches it first."""
    shared = Shared.create()
    assert os.fstat(shared.memory).st_blocks * 512 >= MEMORY_NBYTES
    close_all(shared)


async def test_sealing_refused(
    shm_address: str, shm_accept: ShmAccept, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shm_accept()
    create = os.memfd_create
    monkeypatch.setattr(os, "memfd_create", lambda name, flags: create(name, os.MFD_CLOEXEC))
    with pytest.raises(ConnectError, match=rf"{shm_address}: no sealed shared memory"):
        await connect(shm_address)


@pytest.mark.parametrize("num_spare", range(11))
async def test_too_few_descriptors(
    shm_address: str, shm_accept: ShmAccept, num_spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends are in this process; whichever finds none left, the client gets an error."""
    monkeypatch.setattr(sockets, "NUM_SPARE_DESCRIPTORS", 0)
    await shm_accept()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(num_spare):
            os.close(held.pop())
        try:
            connection = await connect(shm_address, Limits(connect_timeout_s=0.1))
        except (ConnectError, TransportTimeout) as error:
            assert shm_address in str(error)  # noqa: PT017  # with enough to spare there is none
            assert num_spare < 10
        else:
            connection.abort()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
