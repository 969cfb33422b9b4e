"""shm:// against a raw Unix socket that does not shake hands as agreed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from privatelora.errors import ConnectError, TransportTimeout
from privatelora.transports.base import Limits
from privatelora.transports.registry import connect, listen
from privatelora.transports.shm_shared import MEMORY_NBYTES, close_all
from tests.transports.shm_raw import HELLO, last_words, raw_client, socket_name
from tests.transports.support import echo, received, settled

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

VERSION_2 = b"PLSM\x02\0\0\0"
NO_RESIZING = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

# The client's handshake


def memory(nbytes: int = MEMORY_NBYTES, seals: int = NO_RESIZING) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def doorbell(flags: int = os.EFD_NONBLOCK) -> int:
    return os.eventfd(0, flags)


def pipe_end() -> int:
    """Of a pipe without a reader."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.set_blocking(write_end, False)
    return write_end


def resealed(seals: int) -> int:
    return memory(seals=NO_RESIZING & ~seals)


OFFERS: dict[str, tuple[bytes, Callable[[], list[int]], str]] = {
    "garbage": (b"GET / HTTP/1.1\r\n", list, "does not speak as PrivateLoRA does (b'GET"),
    "too short": (HELLO[:7], list, "does not speak"),
    "too long": (HELLO + b"\0", lambda: [memory(), doorbell(), doorbell()], "does not speak"),
    "another version": (VERSION_2, list, "has version 2 of shm:// and this end 1"),
    "nothing shared": (HELLO, list, "0 descriptors where 3"),
    "one shared": (HELLO, lambda: [memory()], "1 descriptors where 3"),
    "four shared": (HELLO, lambda: [memory(), *(doorbell() for _ in "123")], "more descriptors"),
    "many shared": (HELLO, lambda: [memory(), *(doorbell() for _ in range(200))], "more desc"),
    "small": (HELLO, lambda: [memory(4096), doorbell(), doorbell()], "memory of 4096 bytes"),
    "large": (HELLO, lambda: [memory(2**40), doorbell(), doorbell()], "memory of 1099511627776"),
    "unsealed": (HELLO, lambda: [memory(seals=0), doorbell(), doorbell()], "not sealed"),
    "may shrink": (HELLO, lambda: [resealed(fcntl.F_SEAL_SHRINK), doorbell(), doorbell()], "not s"),
    "may grow": (HELLO, lambda: [resealed(fcntl.F_SEAL_GROW), doorbell(), doorbell()], "not seal"),
    "read-only": (
        HELLO,
        lambda: [memory(seals=NO_RESIZING | fcntl.F_SEAL_WRITE), doorbell(), doorbell()],
        "could not be taken",
    ),
    "a pipe for memory": (HELLO, lambda: [pipe_end(), doorbell(), doorbell()], "that is no memory"),
    "a pipe as doorbell": (HELLO, lambda: [memory(), doorbell(), pipe_end()], "sent pipe:"),
    "memory as doorbell": (HELLO, lambda: [memory(), memory(), doorbell()], "sent /memfd:test"),
    "blocking doorbell": (HELLO, lambda: [memory(), doorbell(0), doorbell()], "a non-blocking ev"),
}


@pytest.mark.parametrize("name", OFFERS)
async def test_a_client_that_offers_the_wrong_things_is_dropped(
    shm_address: str, own_errors: pytest.LogCaptureFixture, name: str
) -> None:
    hello, open_fds, says = OFFERS[name]
    async with await listen(shm_address, echo) as listener:
        with raw_client(shm_address) as raw:
            fds = open_fds()
            socket.send_fds(raw, [hello], fds)
            close_all(fds)
            assert await last_words(raw) == ([HELLO] if name == "another version" else [])
        [record] = own_errors.records
        assert (record.name, record.levelname) == ("privatelora.transports", "WARNING")
        assert record.message.startswith(f"{shm_address}: dropped a client: ")
        assert says in record.message
        connection = await connect(listener.address)
        await connection.send(b"still served")
        assert await received(connection) == b"still served"
        await connection.aclose()


async def test_a_client_that_says_nothing_holds_nobody_up(
    shm_address: str, own_errors: pytest.LogCaptureFixture
) -> None:
    async with await listen(shm_address, echo, Limits(connect_timeout_s=0.2)) as listener:
        with raw_client(shm_address) as raw:
            connection = await connect(listener.address)
            await connection.send(b"served")
            assert await received(connection) == b"served"
            await connection.aclose()
            assert await last_words(raw) == []
    assert "said nothing for 0.2 s" in own_errors.text


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
async def test_closing_the_listener_during_a_handshake(shm_address: str, num_steps: int) -> None:
    listener = await listen(shm_address, echo)
    with raw_client(shm_address) as raw:
        for _ in range(num_steps):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await listener.aclose()
        assert await last_words(raw) == []


async def test_a_client_that_leaves_at_once(
    shm_address: str, own_errors: pytest.LogCaptureFixture
) -> None:
    own_errors.set_level("INFO", "privatelora.transports")
    async with await listen(shm_address, echo):
        raw_client(shm_address).close()
        await settled(lambda: "left during the handshake" in own_errors.text)


# The listener's handshake


@pytest.fixture
def raw_listener(shm_address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.bind(socket_name(shm_address))
        raw.listen(1)
        yield raw


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "the listener closed the connection"),
        (VERSION_2, "the listener has version 2 of shm:// and this end 1"),
        (b"HTTP/1.1 400 Bad Request", "does not speak as PrivateLoRA does"),
        (HELLO[:7], "does not speak as PrivateLoRA does"),
    ],
)
async def test_a_listener_that_answers_wrongly(
    shm_address: str, raw_listener: socket.socket, answer: bytes, says: str
) -> None:
    connecting = asyncio.create_task(connect(shm_address))
    raw, _ = await asyncio.to_thread(raw_listener.accept)
    with raw:
        assert raw.recv(100) == HELLO
        if answer:
            raw.send(answer)
    with pytest.raises(ConnectError, match=says) as caught:
        await connecting
    assert shm_address in str(caught.value)


async def test_a_listener_that_hangs(shm_address: str, raw_listener: socket.socket) -> None:
    """First it does not answer, then so many wait that none more is let in."""
    for _ in range(5):
        with pytest.raises(TransportTimeout, match=rf"{shm_address}: no answer within 0.05 s"):
            await connect(shm_address, Limits(connect_timeout_s=0.05))


async def test_cancelling_while_connecting(shm_address: str, raw_listener: socket.socket) -> None:
    for num_steps in range(6):
        connecting = asyncio.create_task(connect(shm_address))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting


async def test_a_full_queue_of_clients_is_waited_out(
    shm_address: str, raw_listener: socket.socket
) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(raw_client(shm_address))
        connecting = asyncio.create_task(connect(shm_address))
        await asyncio.sleep(0.02)
        for _ in range(3):
            raw, _ = await asyncio.to_thread(raw_listener.accept)
            stack.enter_context(raw)
        raw.send(HELLO)
        (await connecting).abort()
