"""Where ZeroMQ ends are, who may be there, and what else may answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
import zmq

from privatelora.errors import (
    AuthError,
    ConfigError,
    ConnectError,
    TransportTimeout,
)
from privatelora.transports import zeromq_client
from privatelora.transports.base import Limits
from privatelora.transports.registry import connect, listen
from tests.transports.cases import free_tcp_port
from tests.transports.support import echo, echoes, settled
from tests.transports.zeromq_peer import NOBODY, output_line, running
from tests.transports.zeromq_raw import Accepting

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

ANYWHERE = "zmq+tcp://127.0.0.1:0"
SOON = Limits(connect_timeout_s=0.2)

# Addresses


@pytest.mark.parametrize(
    ("address", "contact"),
    [
        ("zmq+tcp://127.0.0.1:0", "zmq+tcp://127.0.0.1:"),
        ("zmq+tcp://[::1]:0", "zmq+tcp://[::1]:"),
        ("zmq+tcp://localhost:0", "zmq+tcp://localhost:"),
        ("zmq+tcp://0.0.0.0:0", "zmq+tcp://127.0.0.1:"),
        ("zmq+tcp://[::]:0", "zmq+tcp://[::1]:"),
        ("zmq+tcp://*:0", "zmq+tcp://127.0.0.1:"),
    ],
)
async def test_listening_addresses(address: str, contact: str) -> None:
    async with await listen(address, echo) as listener:
        assert listener.address.startswith(contact)
        assert not listener.address.endswith(":0")
        async with await connect(listener.address) as connection:
            await echoes(connection)


async def test_any_interface_means_both_versions_of_ip() -> None:
    async with await listen("zmq+tcp://*:0", echo) as listener:
        port = listener.address.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]", "localhost"):
            async with await connect(f"zmq+tcp://{host}:{port}") as connection:
                await echoes(connection)


async def test_peers_are_told_apart() -> None:
    accepting = await Accepting.on(ANYWHERE, Limits())
    async with accepting.listener as listener:
        clients = [await connect(listener.address) for _ in range(2)]
        peers = {(await accepting.connections.get()).peer for _ in clients}
        assert peers == {f"zmq+tcp://127.0.0.1 (client {number})" for number in (1, 2)}
        for client in clients:
            assert client.peer == listener.address
            client.abort()


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("zmq+tcp://127.0.0.1", "the port is missing"),
        ("zmq+tcp://127.0.0.1:1/path", "unexpected path"),
        ("zmq+tcp://127.0.0.1:1?a=b", "unknown option"),
        ("zmq+ipc://name:1", "expected a name"),
        ("zmq+ipc:///tmp/file", "expected a name"),
        (f"zmq+ipc://{'n' * 100}", "the name may have 90 characters"),
    ],
)
async def test_addresses_that_cannot_work(address: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        await connect(address)
    with pytest.raises(ConfigError, match=complaint):
        await listen(address, echo)


async def test_the_longest_name() -> None:
    async with (
        await listen(f"zmq+ipc://{'n' * 90}", echo) as listener,
        await connect(listener.address) as connection,
    ):
        await echoes(connection)


async def test_names_need_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"abstract sockets of Linux; use zmq\+tcp"):
        await listen("zmq+ipc://name", echo)


# Other users


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused(own_errors: pytest.LogCaptureFixture) -> None:
    async with await listen(f"zmq+ipc://private-{os.getpid()}", echo) as listener:
        with running("connect as nobody", listener.address) as process:
            assert "AuthError" in await output_line(process)
        assert f"of user {NOBODY}) is of another user" in own_errors.text
        async with await connect(listener.address) as connection:
            await echoes(connection)


async def test_a_listener_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeromq_client, "is_own_user", lambda process: process.user != os.geteuid())
    async with await listen(f"zmq+ipc://private-{os.getpid()}", echo) as listener:
        with pytest.raises(
            AuthError, match=rf"process \d+ of user {os.geteuid()}, of another user"
        ):
            await connect(listener.address)


# Peers that are no ZeroMQ


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """Answers a client, and then its question who answers, in this way; gives the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)

        def serve() -> None:
            for _ in range(2):
                sock, _ = listening.accept()
                with sock, contextlib.suppress(ConnectionError):
                    sock.recv(10)
                    sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100, b"SSH-2.0-x\r\n", b"\xff" + bytes(8)],
)
async def test_what_answers_is_no_zeromq(answer: bytes) -> None:
    with answering(answer) as port:
        address = f"zmq+tcp://127.0.0.1:{port}"
        with pytest.raises(ConnectError, match="does not speak ZeroMQ") as caught:
            await connect(address)
        assert address in str(caught.value)


async def test_another_zeromq_program_answers() -> None:
    async with await listen(ANYWHERE, echo) as listener:
        pass
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(listener.address.removeprefix("zmq+"))
        opening = asyncio.create_task(connect(listener.address))
        await settled(lambda: bool(router.poll(0)))
        routing_id, _ = router.recv_multipart()
        router.send_multipart([routing_id, b"what?"])
        with pytest.raises(ConnectError, match=r"does not open a PrivateLoRA connection .*what"):
            await opening


async def test_silence() -> None:
    name = f"\0privatelora-zmq/silent-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as local, socket.create_server(("127.0.0.1", 0)) as tcp:
        local.bind(name)
        local.listen()
        for address in (
            f"zmq+ipc://silent-{os.getpid()}",
            f"zmq+tcp://127.0.0.1:{tcp.getsockname()[1]}",
        ):
            with pytest.raises(TransportTimeout, match=r"no answer within 0\.2 s") as caught:
                await connect(address, SOON)
            assert address in str(caught.value)


async def test_nobody_is_noticed_at_once() -> None:
    async with asyncio.timeout(5):
        for address in (f"zmq+tcp://127.0.0.1:{free_tcp_port()}", "zmq+ipc://nobody"):
            with pytest.raises(ConnectError, match="check that the peer is running"):
                await connect(address, Limits(connect_timeout_s=60))
