"""CURVE on ZeroMQ: who is let in, what others are told, and what can be seen in between."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
from pathlib import Path

import pytest

from privatelora.errors import AuthError, ConfigError, ConnectError, ConnectionClosed
from privatelora.transports.base import (
    NO_CREDENTIALS,
    Credentials,
    CurveCredentials,
    Limits,
)
from privatelora.transports.curve_keys import read_public_key
from privatelora.transports.registry import connect, listen
from privatelora.transports.zeromq_protocol import ACCEPT, OPEN_MESSAGE
from tests.transports.cases import free_tcp_port
from tests.transports.curve_keyrings import curve, curve_pair
from tests.transports.relay import Relay
from tests.transports.support import echo, echoes, received, settled, tells_trust
from tests.transports.zeromq_raw import Accepting, raw_client

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

ANYWHERE = "zmq+tcp://127.0.0.1:0"
CLOUD = curve("cloud", trust="edge")
EDGE = curve("edge", trust="cloud")


def public_key(name: str) -> str:
    return read_public_key(curve_pair(name)[1]).decode()


async def refused(address: str, credentials: Credentials, complaint: str) -> None:
    with pytest.raises(AuthError, match=complaint) as caught:
        await connect(address, Limits(), credentials)
    assert address in str(caught.value)


def remove_all(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


# Who is who


@pytest.mark.parametrize("address", [ANYWHERE, "zmq+ipc://curve-identities"])
async def test_both_ends_know_each_other(address: str) -> None:
    accepting = await Accepting.on(address, Limits(), CLOUD)
    async with accepting.listener as listener:
        client = await connect(listener.address, Limits(), EDGE)
        server = await accepting.connections.get()
        assert client.identity == f"curve:{public_key('cloud')}"
        assert server.identity == f"curve:{public_key('edge')}"
        client.abort()


async def test_without_keys_nobody_is_known() -> None:
    accepting = await Accepting.on(ANYWHERE, Limits())
    async with accepting.listener as listener:
        client = await connect(listener.address)
        server = await accepting.connections.get()
        assert (client.identity, server.identity) == (None, None)
        client.abort()


async def test_the_allow_list_can_change_at_any_time(
    tmp_path: Path, own_errors: pytest.LogCaptureFixture
) -> None:
    cloud = Credentials(curve=CurveCredentials(curve_pair("cloud")[0], tmp_path))
    async with await listen(ANYWHERE, echo, Limits(), cloud) as listener:
        await refused(listener.address, EDGE, "does not trust this end's public key")
        shutil.copy(curve_pair("edge")[1], tmp_path)
        shutil.copy(curve_pair("other edge")[1], tmp_path)
        for credentials in (EDGE, curve("other edge", trust="cloud")):
            async with await connect(listener.address, Limits(), credentials) as connection:
                await echoes(connection)
        async with await connect(listener.address, Limits(), EDGE) as early:
            remove_all(tmp_path)
            await refused(listener.address, EDGE, "does not trust this end's public key")
            # Whoever is in stays.
            await echoes(early)
        own_errors.clear()
        (tmp_path / "broken.pub").write_text("public: nothing\n")
        await refused(listener.address, EDGE, "does not trust this end's public key")
        assert f"{tmp_path / 'broken.pub'} is not a CURVE key file" in own_errors.text


async def test_who_is_in_is_trusted_as_long_as_the_key_is_there(tmp_path: Path) -> None:
    cloud = Credentials(curve=CurveCredentials(curve_pair("cloud")[0], tmp_path))
    shutil.copy(curve_pair("edge")[1], tmp_path)
    async with (
        await listen(ANYWHERE, tells_trust, Limits(), cloud) as listener,
        await connect(listener.address, Limits(), EDGE) as connection,
    ):
        for change, is_trusted in (
            (lambda: None, b"True"),
            (lambda: shutil.copy(curve_pair("other edge")[1], tmp_path), b"True"),
            (lambda: remove_all(tmp_path), b"False"),
        ):
            change()
            await connection.send(b"?")
            assert await received(connection) == is_trusted


async def test_the_log_names_who_was_refused(own_errors: pytest.LogCaptureFixture) -> None:
    async with await listen(ANYWHERE, echo, Limits(), CLOUD) as listener:
        own_errors.clear()
        stranger = curve("stranger", trust="cloud")
        await refused(listener.address, stranger, re.escape(f"key {public_key('stranger')}; add"))
        [record] = own_errors.records
        assert (record.name, record.levelname) == ("privatelora.transports", "WARNING")
        assert record.getMessage() == (
            f"{listener.address} refused a client from 127.0.0.1 with the public key "
            f"{public_key('stranger')}: it is not among those in {curve_pair('edge')[1]}"
        )


# ZeroMQ often sees only that the other end hung up, and which end sees more is a matter of luck.
@pytest.mark.parametrize("attempt", range(5))
@pytest.mark.parametrize(
    ("listener_keys", "client_keys", "complaint", "logged"),
    [
        (CLOUD, NO_CREDENTIALS, "asks for CURVE keys", "refused a client"),
        (NO_CREDENTIALS, EDGE, "does not use CURVE", "refused a client"),
        (
            CLOUD,
            curve("edge", trust="stranger"),
            "does not have the key in .*stranger.pub",
            "it expects another public key of this listener",
        ),
    ],
    ids=["plain client", "plain listener", "wrong listener key"],
)
async def test_ends_that_do_not_fit(
    own_errors: pytest.LogCaptureFixture,
    listener_keys: Credentials,
    client_keys: Credentials,
    complaint: str,
    logged: str,
    attempt: int,
) -> None:
    async with await listen(ANYWHERE, echo, Limits(), listener_keys) as listener:
        await refused(listener.address, client_keys, complaint)
        await settled(lambda: f"{listener.address} refused a client" in own_errors.text)
        assert logged in own_errors.text
        fitting = NO_CREDENTIALS if listener_keys is NO_CREDENTIALS else EDGE
        async with await connect(listener.address, Limits(), fitting) as connection:
            await echoes(connection)


async def test_a_bare_client_does_not_get_in() -> None:
    async with await listen(ANYWHERE, echo, Limits(), CLOUD) as listener:
        with raw_client(listener.address) as raw:
            raw.send(OPEN_MESSAGE)
            async with await connect(listener.address, Limits(), EDGE) as connection:
                await echoes(connection)
            assert not raw.has_answer()


async def test_the_first_version_of_zmtp_does_not_get_around_curve() -> None:
    """It has no handshake: an empty name, and then messages."""
    async with await listen(ANYWHERE, echo, Limits(), CLOUD) as listener:
        port = int(listener.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"\x01\x00" + bytes([1 + len(OPEN_MESSAGE)]) + b"\x00" + OPEN_MESSAGE)
            raw.settimeout(10)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while more := await asyncio.to_thread(raw.recv, 1000):
                    answer += more
            assert ACCEPT not in answer[10:]
        async with await connect(listener.address, Limits(), EDGE) as connection:
            await echoes(connection)


async def test_nobody_is_not_mistaken_for_a_stranger() -> None:
    with pytest.raises(ConnectError, match="check that the peer is running"):
        await connect(f"zmq+tcp://127.0.0.1:{free_tcp_port()}", Limits(), EDGE)


# Key files


@pytest.mark.parametrize("missing", ["cloud.key", "edge.pub"])
async def test_key_files_are_read_at_the_start(tmp_path: Path, missing: str) -> None:
    for name in ("cloud", "edge"):
        for file in curve_pair(name):
            shutil.copy(file, tmp_path / file.name.removeprefix("curve-"))
    (tmp_path / missing).unlink()
    credentials = CurveCredentials(tmp_path / "cloud.key", tmp_path / "edge.pub")
    for start in (listening, connecting):
        with pytest.raises(ConfigError, match=f"cannot read .*{missing}"):
            await start(Credentials(curve=credentials))


async def listening(credentials: Credentials) -> None:
    await listen(ANYWHERE, echo, Limits(), credentials)


async def connecting(credentials: Credentials) -> None:
    await connect(f"zmq+tcp://127.0.0.1:{free_tcp_port()}", Limits(), credentials)


async def test_a_client_trusts_one_listener(tmp_path: Path) -> None:
    shutil.copy(curve_pair("cloud")[1], tmp_path)
    credentials = Credentials(curve=CurveCredentials(curve_pair("edge")[0], tmp_path))
    with pytest.raises(ConfigError, match="a client trusts exactly one listener"):
        await connecting(credentials)


# In between


@pytest.mark.parametrize(
    ("cloud", "edge", "in_the_clear"),
    [(NO_CREDENTIALS, NO_CREDENTIALS, True), (CLOUD, EDGE, False)],
    ids=["plain", "CURVE"],
)
async def test_who_listens_in_between(
    cloud: Credentials, edge: Credentials, in_the_clear: bool
) -> None:
    question, answer = b"a very private question", b"an answer that is no less private"
    accepting = await Accepting.on(ANYWHERE, Limits(), cloud)
    async with accepting.listener as listener:
        with Relay(int(listener.address.rpartition(":")[2])) as wire:
            client = await connect(f"zmq+tcp://127.0.0.1:{wire.port}", Limits(), edge)
            server = await accepting.connections.get()
            before = len(wire.up)
            for size in (0, 200, 300_000):
                await client.send(question, bytes(size))
                assert len(await server.recv()) == len(question) + size
                await server.send(answer, bytes(size))
                assert len(await client.recv()) == len(answer) + size
            assert (question in wire.up) is in_the_clear
            assert (answer in wire.down) is in_the_clear
            assert client.counters.sent_nbytes == len(wire.up) - before
            client.abort()


async def test_tampering_ends_the_connection() -> None:
    accepting = await Accepting.on(ANYWHERE, Limits(), CLOUD)
    async with accepting.listener as listener:
        with Relay(int(listener.address.rpartition(":")[2])) as wire:
            client = await connect(f"zmq+tcp://127.0.0.1:{wire.port}", Limits(), EDGE)
            server = await accepting.connections.get()
            wire.change = flipped_at_the_end
            await server.send(b"change this")
            with pytest.raises(ConnectionClosed, match=r"lost(: what arrives has been changed|$)"):
                await client.recv()
            client.abort()


def flipped_at_the_end(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])
