"""TLS while frames cross: ends, cuts, tampering, and what an onlooker sees."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from subprocess import DEVNULL, PIPE, Popen
from typing import Protocol

import pytest

from privatelora.errors import (
    ConnectionClosed,
    RemoteProtocolError,
)
from privatelora.transports import tls_stream
from privatelora.transports.base import Connection, Credentials, Limits
from privatelora.transports.framing import MAGIC
from privatelora.transports.registry import connect, listen
from privatelora.transports.tls_stream import GREETING
from tests.transports.relay import Relay
from tests.transports.support import echo, received, settled
from tests.transports.tls_keyrings import identity
from tests.transports.tls_support import (
    ANYWHERE,
    CLOUD,
    CLOUD_WITH_CLIENTS,
    EDGE,
    framed,
    port_of,
)

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

# On the way


class OpenRaw(Protocol):
    async def __call__(self, limits: Limits = ...) -> tuple[ssl.SSLSocket, Connection]: ...


@pytest.fixture
async def open_raw() -> AsyncIterator[OpenRaw]:
    """Connects a blocking TLS socket to a listener; returns it, greeted, and the listener's end."""
    async with AsyncExitStack() as stack:
        context = ssl.create_default_context(cafile=identity("cloud").certificate)

        async def open_raw(limits: Limits = Limits()) -> tuple[ssl.SSLSocket, Connection]:  # noqa: B008
            accepted: asyncio.Queue[Connection] = asyncio.Queue()

            async def handler(connection: Connection) -> None:
                accepted.put_nowait(connection)
                await asyncio.Event().wait()

            listener = await listen(ANYWHERE, handler, limits, CLOUD)
            stack.push_async_callback(listener.aclose)

            def dial() -> ssl.SSLSocket:
                raw = socket.create_connection(("127.0.0.1", port_of(listener.address)), timeout=10)
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                tls_socket = context.wrap_socket(
                    raw, suppress_ragged_eofs=False, server_hostname="127.0.0.1"
                )
                assert tls_socket.recv(100) == GREETING
                return tls_socket

            tls_socket = await asyncio.to_thread(dial)
            stack.enter_context(tls_socket)
            return tls_socket, await accepted.get()

        yield open_raw


def cut(tls_socket: ssl.SSLSocket) -> None:
    """End the TCP stream, without the end mark of TLS before it."""
    socket.socket.shutdown(tls_socket, socket.SHUT_WR)


@pytest.mark.parametrize("nbytes", [0, 4, 40_000])
async def test_truncation_is_a_loss_and_not_an_end(open_raw: OpenRaw, nbytes: int) -> None:
    tls_socket, connection = await open_raw()
    tls_socket.sendall(framed(b"whole") + framed(bytes(100_000))[:nbytes])
    cut(tls_socket)
    assert await received(connection) == b"whole"
    for _ in range(2):
        with pytest.raises(ConnectionClosed, match=r"was lost: .* cut off without the end mark"):
            await connection.recv()


async def test_an_orderly_end_is_no_loss(open_raw: OpenRaw) -> None:
    tls_socket, connection = await open_raw()
    tls_socket.sendall(framed(b"whole"))
    receiving = asyncio.create_task(connection.recv())
    assert bytes(await receiving) == b"whole"
    unwrapping = asyncio.create_task(asyncio.to_thread(tls_socket.unwrap))
    with pytest.raises(ConnectionClosed, match=r"closed the connection$"):
        await connection.recv()
    payload = b"after the peer's end" * 100_000
    sending = asyncio.create_task(connection.send(payload))
    await sending
    await connection.aclose()
    with contextlib.suppress(OSError):  # data where it expects the end
        await unwrapping


async def test_this_ends_close_is_an_orderly_end(open_raw: OpenRaw) -> None:
    tls_socket, connection = await open_raw()
    await connection.send(b"whole")
    closing = asyncio.create_task(connection.aclose())

    def read_all() -> bytes:
        data = b""
        while piece := tls_socket.recv(1000):
            data += piece
        tls_socket.sendall(framed(b"dropped"))
        return data

    assert await asyncio.to_thread(read_all) == framed(b"whole")
    assert not closing.done()
    tls_socket.close()
    await closing


async def test_the_end_gets_through_a_full_socket(open_raw: OpenRaw) -> None:
    """close_notify has to wait until there is room for it."""
    tls_socket, connection = await open_raw()
    frames = 0
    while True:  # fill what the system buffers with frames as small as the end mark
        sending = asyncio.create_task(connection.send(b"x" * 1000))
        _, pending = await asyncio.wait({sending}, timeout=0.05)
        frames += 1
        if pending:
            break
    closing = asyncio.create_task(connection.aclose())

    def read_all() -> int:
        nbytes = 0
        while piece := tls_socket.recv(100_000):
            nbytes += len(piece)
        return nbytes

    assert await asyncio.to_thread(read_all) == frames * 1008
    await sending
    tls_socket.close()
    await closing


async def test_the_end_waits_for_room(open_raw: OpenRaw, monkeypatch: pytest.MonkeyPatch) -> None:
    tls_socket, connection = await open_raw()
    await connection.send(b"whole")
    refused: list[int] = []
    send = socket.socket.send

    def send_later(self: socket.socket, data: bytes) -> int:
        if len(refused) < 3:
            refused.append(len(data))
            raise BlockingIOError
        return send(self, data)

    monkeypatch.setattr(socket.socket, "send", send_later)
    closing = asyncio.create_task(connection.aclose())
    assert await asyncio.to_thread(tls_socket.recv, 100) == framed(b"whole")
    assert await asyncio.to_thread(tls_socket.recv, 100) == b""
    assert len(refused) == 3
    tls_socket.close()
    await closing


async def test_garbage_between_records(open_raw: OpenRaw) -> None:
    tls_socket, connection = await open_raw()
    tls_socket.sendall(framed(b"whole"))
    socket.socket.send(tls_socket, b"not a TLS record at all")
    assert await received(connection) == b"whole"
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match=r"broke the rules of TLS .*tampered"):
            await connection.recv()
    with pytest.raises(ConnectionClosed):
        await connection.send(b"anything")


async def test_many_frames_in_one_record_are_announced(open_raw: OpenRaw) -> None:
    """The descriptor is silent about what is decrypted already."""
    tls_socket, connection = await open_raw()
    tls_socket.sendall(framed(b"1") + framed(b"2") + framed(b"3"))
    tls_socket.sendall(framed(b"4"))
    await settled(lambda: connection.counters.received_frames == 4)
    for number in (b"1", b"2", b"3", b"4"):
        with pytest.raises(StopIteration) as done:
            connection.recv().send(None)
        assert bytes(done.value.value) == number


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to ask for new keys")
async def test_endless_requests_for_new_keys_end_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each makes OpenSSL write an answer, which would fill memory while this end only reads."""
    monkeypatch.setattr(tls_stream, "_MAX_ANSWERS_NBYTES", 100)
    failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def handler(connection: Connection) -> None:
        try:
            await connection.recv()
        except Exception as error:
            failed.set_result(error)

    def ask(port: int) -> None:
        command = ["openssl", "s_client", "-msg", "-connect", f"127.0.0.1:{port}"]
        with Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, bufsize=0) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            shown = b""
            for mark in (GREETING, *[b"KeyUpdate"] * 100):
                while mark not in shown:
                    piece = client.stdout.read(4096)
                    if not piece:
                        return
                    shown += piece
                shown = shown.partition(mark)[2]
                with contextlib.suppress(BrokenPipeError):
                    client.stdin.write(b"K\n")  # s_client's command, if it is read alone
            client.kill()

    async with await listen(ANYWHERE, handler, Limits(), CLOUD) as listener:
        await asyncio.to_thread(ask, port_of(listener.address))
        assert "keeps asking for new TLS keys" in str(await failed)


# What is seen and done on the way


@asynccontextmanager
async def relayed(
    scheme: str = "tls", listener_keys: Credentials = CLOUD, client_keys: Credentials = EDGE
) -> AsyncIterator[tuple[Connection, Relay]]:
    """A connection to an echo, and the relay that it passes through."""
    async with await listen(f"{scheme}://127.0.0.1:0", echo, Limits(), listener_keys) as listener:
        with Relay(port_of(listener.address)) as wire:
            address = f"{scheme}://127.0.0.1:{wire.port}"
            async with await connect(address, Limits(), client_keys) as connection:
                yield connection, wire


@pytest.mark.parametrize(
    ("scheme", "listener_keys", "client_keys"),
    [("tcp", Credentials(), Credentials()), ("tls", CLOUD_WITH_CLIENTS, EDGE)],
    ids=["tcp", "tls"],
)
async def test_nothing_crosses_in_the_clear(
    scheme: str, listener_keys: Credentials, client_keys: Credentials
) -> None:
    patterns = [b"a secret question", b"\x00\x01\x02\x03" * 8, b"in a large frame"]
    async with relayed(scheme, listener_keys, client_keys) as (connection, wire):
        for pattern in patterns:
            for frame in (pattern, bytes(30_000) + pattern + bytes(70_000)):
                await connection.send(frame[:5], memoryview(frame)[5:])
                assert await received(connection) == frame
    assert len(wire.up) > 300_000
    assert len(wire.down) > 300_000
    for pattern in (*patterns, MAGIC, bytes(100)):
        assert (pattern in wire.up, pattern in wire.down) == (scheme == "tcp", scheme == "tcp")


async def test_a_small_frame_is_one_record() -> None:
    async with relayed() as (connection, wire):
        wire.up.clear()
        await connection.send(b"h" * 20, b"", b"p" * 700, b"t" * 48)
        await connection.recv()
        # Type and length of the record: the frame, its inner type, and the tag.
        assert wire.up[:5] == b"\x17\x03\x03" + (8 + 768 + 1 + 16).to_bytes(2, "big")
        assert len(wire.up) == 5 + 8 + 768 + 1 + 16


async def test_tampering_is_noticed() -> None:
    async with relayed() as (connection, wire):
        await connection.send(b"true")
        assert await received(connection) == b"true"
        wire.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
        await connection.send(b"true")
        with pytest.raises(RemoteProtocolError, match="broke the rules of TLS"):
            await connection.recv()


async def test_a_cut_on_the_way_is_a_loss() -> None:
    async with relayed() as (connection, wire):
        wire.cut()
        with pytest.raises(ConnectionClosed, match=r"was lost: .* without the end mark"):
            await connection.recv()
