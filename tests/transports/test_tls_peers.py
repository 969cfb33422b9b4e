"""Peers that speak TLS in another way, not at all, or to do harm."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import pytest

from privatelora.errors import (
    ConnectError,
    RemoteProtocolError,
    TransportTimeout,
)
from privatelora.transports import tls as tls_module
from privatelora.transports.base import Limits
from privatelora.transports.registry import connect, listen
from privatelora.transports.tls_stream import GREETING
from tests.transports.support import blocked, cancel, echo, received, settled
from tests.transports.tls_keyrings import identity
from tests.transports.tls_support import (
    ANYWHERE,
    CLOUD,
    EDGE,
    framed,
    logged,
    port_of,
    round_trip,
)

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

# Other ways to speak


async def test_a_plain_client_at_a_tls_listener(own_errors: pytest.LogCaptureFixture) -> None:
    async with await listen(ANYWHERE, echo, Limits(), CLOUD) as listener:
        address = f"tcp://127.0.0.1:{port_of(listener.address)}"
        async with await connect(address) as connection:
            await connection.send(b"hello")
            with pytest.raises(
                RemoteProtocolError, match=f"{address} does not send .*: use tls:// on both"
            ):
                await connection.recv()
        await logged(own_errors, f"{listener.address}: refused", "it does not speak TLS")
        await round_trip(listener.address, EDGE)


async def test_a_tls_client_at_a_plain_listener(own_errors: pytest.LogCaptureFixture) -> None:
    async with await listen("tcp://127.0.0.1:0", echo) as listener:
        address = f"tls://127.0.0.1:{port_of(listener.address)}"
        with pytest.raises(
            ConnectError, match=rf"^cannot connect to {address}: it ended .*listens .* tls://"
        ):
            await connect(address, Limits(), EDGE)
        await logged(own_errors, listener.address, "it speaks TLS: use tls://")


async def test_an_old_client(own_errors: pytest.LogCaptureFixture) -> None:
    context = ssl.create_default_context(cafile=identity("cloud").certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with await listen(ANYWHERE, echo, Limits(), CLOUD) as listener:
        with (
            socket.create_connection(("127.0.0.1", port_of(listener.address))) as raw,
            pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
        ):
            await asyncio.to_thread(
                lambda: context.wrap_socket(raw, server_hostname="127.0.0.1").close()
            )
        await logged(own_errors, f"{listener.address}: refused", "it does not speak TLS 1.3")
        await round_trip(listener.address, EDGE)


class Serve(Protocol):
    def __call__(self, raw: socket.socket) -> None: ...


@asynccontextmanager
async def served(serve: Serve) -> AsyncIterator[str]:
    """The tls:// address of a blocking server that takes one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            raw, _peer = listening.accept()
            with raw, contextlib.suppress(OSError):
                serve(raw)

        task = asyncio.create_task(asyncio.to_thread(run))
        yield f"tls://127.0.0.1:{listening.getsockname()[1]}"
        await task


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*identity("cloud"))
    return context


async def test_an_old_listener() -> None:
    context = server_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def serve(raw: socket.socket) -> None:
        context.wrap_socket(raw, server_side=True).close()

    async with served(serve) as address:
        with pytest.raises(ConnectError, match=rf"{address}: it does not speak TLS 1\.3, the only"):
            await connect(address, Limits(), EDGE)


async def test_a_listener_of_another_kind() -> None:
    def serve(raw: socket.socket) -> None:
        with server_context().wrap_socket(raw, server_side=True) as tls_socket:
            tls_socket.sendall(b"220 mail.example ESMTP\r\n")
            tls_socket.recv(1)

    async with served(serve) as address:
        with pytest.raises(ConnectError, match=f"{address}: .* does not greet as a PrivateLoRA"):
            await connect(address, Limits(), EDGE)


async def test_a_greeting_and_a_frame_in_one_record() -> None:
    def serve(raw: socket.socket) -> None:
        with server_context().wrap_socket(raw, server_side=True) as tls_socket:
            tls_socket.sendall(GREETING + framed(b"first"))
            tls_socket.recv(1)

    async with served(serve) as address:
        connection = await connect(address, Limits(), EDGE)
        assert await received(connection) == b"first"
        connection.abort()


async def test_a_listener_that_speaks_no_tls() -> None:
    def serve(raw: socket.socket) -> None:
        raw.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        raw.recv(10_000)
        raw.recv(1)

    async with served(serve) as address:
        with pytest.raises(ConnectError, match=f"{address}: it does not speak TLS; check"):
            await connect(address, Limits(), EDGE)


@pytest.mark.parametrize("is_tls", [False, True])
async def test_a_silent_listener(is_tls: bool) -> None:
    def serve(raw: socket.socket) -> None:
        if is_tls:
            raw = server_context().wrap_socket(raw, server_side=True)
        while raw.recv(10_000):
            pass
        raw.close()

    async with served(serve) as address:
        with pytest.raises(
            TransportTimeout, match=rf"{address}: TLS was not set up within 0\.2 s; check"
        ):
            await connect(address, Limits(connect_timeout_s=0.2), EDGE)


async def test_cancellation_while_connecting() -> None:
    def serve(raw: socket.socket) -> None:
        while raw.recv(10_000):
            pass

    async with served(serve) as address:

        async def dial() -> None:
            await connect(address, Limits(), EDGE)

        await cancel(await blocked(dial()))


# Handshakes under attack


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1").do_handshake()
    return outgoing.read()


HOSTILE = {
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "it does not speak TLS"),
    "zeros": (bytes(100_000), "refused"),
    "half a hello": (client_hello()[:100], "it ended the connection before TLS was set up"),
    "hello and garbage": (client_hello() + b"\x17\x03\x03\x00\x20" + bytes(32), "refused"),
    "a long record": (b"\x16\x03\x01\xff\xff" + bytes(65_535), "refused"),
    "an alert": (b"\x15\x03\x01\x00\x02\x02\x28", "the TLS handshake failed ("),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_bytes(name: str, own_errors: pytest.LogCaptureFixture) -> None:
    stream, reason = HOSTILE[name]
    async with await listen(ANYWHERE, echo, Limits(), CLOUD) as listener:
        with socket.create_connection(("127.0.0.1", port_of(listener.address))) as raw:
            raw.sendall(stream)
            raw.shutdown(socket.SHUT_WR)
            await logged(own_errors, f"{listener.address}: refused tls://127.0.0.1:", reason)
        await round_trip(listener.address, EDGE)


async def test_a_refused_peer_can_read_why(own_errors: pytest.LogCaptureFixture) -> None:
    """A listener that closed at once, with bytes unread, would reset the connection."""
    async with await listen(ANYWHERE, echo, Limits(), CLOUD) as listener:
        with socket.create_connection(("127.0.0.1", port_of(listener.address))) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n" + b"x" * 300_000)
            assert await asyncio.to_thread(raw.recv, 100) == b"\x15\x03\x03\x00\x02\x02\x46"
            assert await asyncio.to_thread(raw.recv, 100) == b""
        await logged(own_errors, "it does not speak TLS")


async def test_silent_clients_do_not_hold_the_listener(
    own_errors: pytest.LogCaptureFixture,
) -> None:
    limits = Limits(connect_timeout_s=0.3)
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(await listen(ANYWHERE, echo, limits, CLOUD))
        port = port_of(listener.address)
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for raw in silent:
            stack.enter_context(raw)
        for _ in range(3):
            await round_trip(listener.address, EDGE)
        await settled(lambda: len(own_errors.messages) == len(silent))
        await logged(own_errors, "it did not finish the TLS handshake within 0.3 s")
        for raw in silent:
            assert await asyncio.to_thread(raw.recv, 1) == b""


async def test_the_oldest_handshake_gives_way(
    monkeypatch: pytest.MonkeyPatch, own_errors: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls_module, "MAX_HANDSHAKES", 3)
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(await listen(ANYWHERE, echo, Limits(), CLOUD))
        port = port_of(listener.address)
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
        for raw in silent:
            stack.enter_context(raw)
        await settled(lambda: len(own_errors.messages) == 7)
        await round_trip(listener.address, EDGE)
        await logged(own_errors, listener.address, "too many handshakes are under way")
        for raw in silent[:8]:
            assert await asyncio.to_thread(raw.recv, 1) == b""
        for raw in silent[8:]:
            raw.setblocking(False)
            with pytest.raises(BlockingIOError):
                raw.recv(1)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
async def test_closing_the_listener_ends_handshakes(num_steps: int) -> None:
    listener = await listen(ANYWHERE, echo, Limits(), CLOUD)
    with (
        socket.create_connection(("127.0.0.1", port_of(listener.address))) as silent,
        socket.create_connection(("127.0.0.1", port_of(listener.address))) as began,
    ):
        began.sendall(client_hello())
        for _ in range(num_steps):
            await asyncio.sleep(0)
        async with asyncio.timeout(1):
            await listener.aclose()
        silent.settimeout(5)
        with contextlib.suppress(ConnectionResetError):  # where it was never accepted
            assert await asyncio.to_thread(silent.recv, 1) == b""
