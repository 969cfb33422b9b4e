"""Dialling, listening and accepting: addresses, refusals, time limits, lack of descriptors."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from privatelora.errors import ConfigError, ConnectError, TransportTimeout
from privatelora.transports import sockets
from privatelora.transports.base import Limits
from privatelora.transports.registry import connect, listen
from tests.transports.cases import free_tcp_port
from tests.transports.support import blocked, cancel, echo, received, settled

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")


async def round_trip(address: str) -> str:
    """Exchange a frame with an echo listener; return what it is called as a peer."""
    async with await connect(address) as connection:
        await connection.send(b"hello")
        assert await received(connection) == b"hello"
        return connection.peer


@pytest.mark.parametrize(
    ("listen_host", "contact_hosts"),
    [
        ("127.0.0.1", ["127.0.0.1", "localhost"]),
        ("localhost", ["localhost", "127.0.0.1"]),
        ("0.0.0.0", ["127.0.0.1"]),
        pytest.param("[::1]", ["[::1]"], marks=needs_ipv6),
        pytest.param("[::]", ["[::1]"], marks=needs_ipv6),
        pytest.param("*", ["127.0.0.1", "[::1]"], marks=needs_ipv6),
    ],
)
async def test_hosts(listen_host: str, contact_hosts: list[str]) -> None:
    async with await listen(f"tcp://{listen_host}:0", echo) as listener:
        port = int(listener.address.rpartition(":")[2])
        assert port > 0
        await round_trip(listener.address)
        for host in contact_hosts:
            assert (await round_trip(f"tcp://{host}:{port}")).endswith(f":{port}")


async def test_contact_address_keeps_the_name_and_shows_the_port() -> None:
    port = free_tcp_port()
    async with await listen(f"tcp://localhost:{port}", echo) as listener:
        assert listener.address == f"tcp://localhost:{port}"


async def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConnectError, match=f"{address}: address already in use; .*or 0"):
            await listen(address, echo)


async def test_foreign_listen_address() -> None:
    with pytest.raises(ConnectError, match=r"192\.0\.2\.1.* name an address of this machine"):
        await listen("tcp://192.0.2.1:0", echo)


async def test_refused() -> None:
    address = f"tcp://127.0.0.1:{free_tcp_port()}"
    with pytest.raises(
        ConnectError, match=f"{address}: connection refused; .*is running"
    ) as caught:
        await connect(address)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_impossible_host_name() -> None:
    with pytest.raises(ConnectError, match=r"cannot resolve the host of tcp://aaa.*spelling"):
        await connect(f"tcp://{'a' * 64}.example:1")


@pytest.mark.asyncio(loop_factories=["asyncio"])  # uvloop has a resolver of its own
async def test_unknown_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConnectError, match=r"tcp://nowhere:1: name or service not known;"):
        await connect("tcp://nowhere:1")
    with pytest.raises(ConnectError, match=r"tcp://nowhere:1: name or service not known;"):
        await listen("tcp://nowhere:1", echo)


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:80", "tcp://127.0.0.1:0", "tcp://host", "tcp://host:1?x=y"]
)
async def test_unusable_contact_addresses(address: str) -> None:
    with pytest.raises(ConfigError):
        await connect(address)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A local port that does not answer."""
    with socket.socket() as deaf, socket.socket() as queued, socket.socket() as pending:
        # A full backlog makes Linux drop further attempts, as a firewall would.
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for sock in (queued, pending):
            sock.setblocking(False)
            assert sock.connect_ex(deaf.getsockname()) in (0, errno.EINPROGRESS)
        yield deaf.getsockname()[1]


async def test_timeout_while_connecting(silent_port: int) -> None:
    address = f"tcp://127.0.0.1:{silent_port}"
    with pytest.raises(TransportTimeout, match=rf"{address}: no answer within 0\.1 s"):
        await connect(address, Limits(connect_timeout_s=0.1))


async def test_cancellation_while_connecting(silent_port: int) -> None:
    async def dial() -> None:
        await connect(f"tcp://127.0.0.1:{silent_port}")

    await cancel(await blocked(dial()))


async def test_every_address_of_a_host_is_tried(
    monkeypatch: pytest.MonkeyPatch, silent_port: int
) -> None:
    ports: list[int] = []

    def resolve(*args: object, **kwargs: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", p)) for p in ports]

    async with await listen("tcp://127.0.0.1:0", echo) as listener:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        limits = Limits(connect_timeout_s=0.3)
        refusing_port, live_port = free_tcp_port(), int(listener.address.rpartition(":")[2])
        ports[:] = [refusing_port, silent_port, live_port]
        async with await connect("tcp://several:1", limits) as connection:
            assert connection.peer == listener.address
        for ports[:] in ([refusing_port, silent_port], [silent_port, refusing_port]):
            with pytest.raises(ConnectError, match="refused"):
                await connect("tcp://several:1", limits)


async def test_connected_sockets_are_configured() -> None:
    with socket.socket() as sock:
        sockets.configure(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert not sock.getblocking()


async def test_accepting_goes_on_after_running_out_of_descriptors(
    monkeypatch: pytest.MonkeyPatch, own_errors: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sockets, "ACCEPT_RETRY_S", 0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with await listen("tcp://127.0.0.1:0", echo) as listener:
        with socket.socket() as raw:
            raw.setblocking(False)
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            held = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
            for _ in range(highest + 1):  # fill the gaps, so that no number is left
                held.append(os.open("/dev/null", os.O_RDONLY))
                if held[-1] > highest:
                    break
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, hard))
                raw.connect_ex(("127.0.0.1", int(listener.address.rpartition(":")[2])))
                await settled(lambda: "too many open files" in own_errors.text)
                for _ in range(100):
                    await asyncio.sleep(0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for fd in held:
                    os.close(fd)
            await asyncio.get_running_loop().sock_sendall(raw, b"PLR1\x02\0\0\0ok")
            assert await asyncio.get_running_loop().sock_recv(raw, 100) == b"PLR1\x02\0\0\0ok"
        assert own_errors.text.count("too many open files") == 1
        assert f"{listener.address} cannot accept" in own_errors.text
        await round_trip(listener.address)


async def test_closing_the_listener_while_accepting_is_paused(
    monkeypatch: pytest.MonkeyPatch, own_errors: pytest.LogCaptureFixture
) -> None:
    def fail(self: socket.socket) -> None:
        raise OSError(errno.ENFILE, "File table overflow")

    listener = await listen("tcp://127.0.0.1:0", echo)
    monkeypatch.setattr(socket.socket, "accept", fail)
    with socket.create_connection(("127.0.0.1", int(listener.address.rpartition(":")[2]))):
        await settled(lambda: "file table overflow" in own_errors.text)
        await listener.aclose()
