"""Who attacks a guarded cloud over the network, and whoever else is answered meanwhile.

Bob has a token and means harm; Mallory has none. Alice's answer is on its way all the time, and
comes out as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lz4.block
import openai
import psutil
import pytest

from privatelora.errors import AuthError, ConnectError, ConnectionClosed, PrivateLoRAError
from privatelora.partition.shard import open_shard
from privatelora.runtime.client_tokens import digest
from privatelora.runtime.payload.codec import CODEC_NAMES, plain_nbytes
from privatelora.runtime.wire.messages import (
    CloseSession,
    ErrorCode,
    ErrorReply,
    Fingerprints,
    Hello,
    Message,
    OpenSession,
    OutputRows,
    Role,
    SessionOpened,
    StepBegin,
    TensorPayload,
)
from privatelora.transports.base import Connection, Credentials, Limits
from privatelora.transports.framing import HEADER, MAGIC
from privatelora.transports.registry import connect
from tests.e2e.deployment import Deployment, tiny_deployment, write_yaml
from tests.e2e.processes import EDGE, SERVE, Process
from tests.transports.tls_keyrings import identity, tls
from tests.unit.peers import RawPeer
from tests.wire.samples import sealed

LZ4: Any = lz4.block  # ships without annotations
TOKENS = {"alice": "a" * 43, "bob": "b" * 43}
MEMORY_NBYTES = 24 * 2**20
"""By which a cloud may grow under an attack: what it sets up for anybody."""


@dataclass
class Guarded:
    """A cloud that wants tokens over TLS, and alice's edge."""

    address: str
    cloud: Process
    client: openai.OpenAI
    hello: Hello
    hidden_size: int

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def resident_nbytes(self) -> int:
        return int(psutil.Process(self.cloud.pid).memory_info().rss)

    def stream(self) -> Iterator[str]:
        for chunk in self.client.completions.create(
            model="adapter",
            prompt="The weather in the mountains",
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            yield from (choice.text for choice in chunk.choices)

    @contextmanager
    def undisturbed(self, expected: str) -> Iterator[None]:
        """Alice's answer is on its way while the context lasts, and right after it."""
        pieces = self.stream()
        begun = [next(pieces) for _ in range(5)]
        yield
        assert "".join([*begun, *pieces]) == expected
        assert self.cloud.is_running
        assert "Traceback" not in self.cloud.stderr

    @asynccontextmanager
    async def greeted(self, who: str | None, **hello: Any) -> AsyncIterator[RawPeer]:
        """An attacker's connection on which Hello was said, and not yet answered."""
        async with await connect(self.address, Limits(), tls(trust="cloud")) as connection:
            peer = RawPeer(Role.EDGE, connection)
            token = None if who is None else TOKENS.get(who, who)
            await peer.say(replace(self.hello, token=token, **hello))
            yield peer

    @asynccontextmanager
    async def as_bob(self) -> AsyncIterator[RawPeer]:
        async with self.greeted("bob") as peer:
            await peer.hear(Hello)
            yield peer

    def step(self, session_id: int, hidden: TensorPayload | None = None) -> StepBegin:
        one_row = TensorPayload("fp32", (1, self.hidden_size), bytes(4 * self.hidden_size))
        return StepBegin(session_id, 0, 0, OutputRows.LAST, hidden or one_row, None)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    options = {"max_position_embeddings": 512}
    directory = tmp_path_factory.mktemp("attackers")
    deployment = tiny_deployment("llama", directory, model_options=options, rank_up=8, rank_down=8)[
        0
    ]
    with ExitStack() as stack:
        yield serve_guarded(stack, deployment, deployment.directory)


def serve_guarded(stack: ExitStack, deployment: Deployment, directory: Path) -> Guarded:
    own = identity("cloud")
    write_yaml(directory / "tokens.yaml", {name: digest(t) for name, t in TOKENS.items()})
    (directory / "alice.token").write_text(TOKENS["alice"])
    cloud = stack.enter_context(
        Process(
            SERVE,
            deployment.cloud_yaml(
                listen="tls://127.0.0.1:0",
                tls={"certificate": str(own.certificate), "key": str(own.key)},
                tokens="tokens.yaml",
            ),
        )
    )
    address = cloud.read_ready()
    edge = stack.enter_context(
        Process(
            EDGE,
            deployment.edge_yaml(
                address,
                tls={"trust": str(own.certificate)},
                token={"file": "alice.token"},
                http={"listen": "127.0.0.1:0"},
            ),
        )
    )
    client = openai.OpenAI(base_url=f"{edge.read_ready()}/v1", api_key="x", max_retries=0)
    stack.enter_context(client)
    manifest = open_shard(deployment.cloud_shard, "cloud").manifest
    hello = Hello(
        Role.EDGE, "an attacker", Fingerprints(*manifest.fingerprints), CODEC_NAMES, 2**20
    )
    return Guarded(address, cloud, client, hello, manifest.config.hidden_size)


@pytest.fixture(scope="module")
def expected(guarded: Guarded) -> str:
    return "".join(guarded.stream())


async def refusal(peer: RawPeer) -> ErrorReply:
    async with asyncio.timeout(10):
        return await peer.hear_error()


# Who may come in


@pytest.mark.parametrize("token", [None, "x" * 43, "a" * 42, "A" * 43, digest("a" * 43)])
async def test_without_a_known_token_nobody_gets_in(
    guarded: Guarded, expected: str, token: str | None
) -> None:
    with guarded.undisturbed(expected):
        async with guarded.greeted(token) as mallory:
            reply = await refusal(mallory)
            assert (reply.code, reply.session_id) == (ErrorCode.AUTH, None)
            assert all(secret not in reply.message for secret in TOKENS.values())


async def test_nothing_is_done_for_who_has_not_greeted(guarded: Guarded, expected: str) -> None:
    opening = OpenSession(0, 64, "fp32", "fp32")
    with guarded.undisturbed(expected):
        async with await connect(guarded.address, Limits(), tls(trust="cloud")) as connection:
            peer = RawPeer(Role.EDGE, connection)
            said = RawPeer(Role.EDGE, connection)  # only for what it writes
            said.wire.send(guarded.hello)
            said.wire.receive(cloud_hello(guarded))
            await connection.send(*said.wire.send(opening))
            peer.wire.send(guarded.hello)
            assert (await refusal(peer)).code is ErrorCode.PROTOCOL


def cloud_hello(guarded: Guarded) -> memoryview:
    other = RawPeer(Role.CLOUD, None)  # type: ignore[arg-type]  # only for what it writes
    own = RawPeer(Role.EDGE, None)  # type: ignore[arg-type]
    other.wire.receive(memoryview(b"".join(own.wire.send(guarded.hello))))
    hello = replace(guarded.hello, role=Role.CLOUD, max_positions=1, max_sessions=1)
    return memoryview(bytearray(b"".join(other.wire.send(hello))))


async def test_a_certificate_of_somebody_else_is_no_cloud(guarded: Guarded) -> None:
    with pytest.raises(AuthError, match="certificate"):
        await connect(guarded.address, Limits(), tls(trust="somebody else"))


# Downgrades


@pytest.mark.parametrize("version", [0, 2, 65535])
async def test_another_version_is_refused_and_not_spoken(
    guarded: Guarded, expected: str, version: int
) -> None:
    with guarded.undisturbed(expected):
        async with await connect(guarded.address, Limits(), tls(trust="cloud")) as connection:
            peer = RawPeer(Role.EDGE, connection)
            frame = bytearray(b"".join(peer.wire.send(replace(guarded.hello, token="b" * 43))))
            frame[2:4] = version.to_bytes(2, "little")
            await connection.send(frame)
            assert (await refusal(peer)).code is ErrorCode.VERSION


@pytest.mark.parametrize("highest", [ssl.TLSVersion.TLSv1_2])
def test_an_older_tls_is_refused(guarded: Guarded, highest: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=str(identity("cloud").certificate))
    context.maximum_version = highest
    with (
        socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


async def test_unencrypted_nothing_is_said(guarded: Guarded, expected: str) -> None:
    plain = guarded.address.replace("tls://", "tcp://")
    with guarded.undisturbed(expected):
        connection: Connection | None = None
        try:
            connection = await connect(plain, Limits(), Credentials())
            await connection.send(b"".join(RawPeer(Role.EDGE, connection).wire.send(guarded.hello)))
            with pytest.raises(PrivateLoRAError):
                await connection.recv()
        except (ConnectError, ConnectionClosed):
            pass
        finally:
            if connection is not None:
                connection.abort()


# Other people's sessions


async def test_a_session_id_means_nothing_on_another_connection(
    guarded: Guarded, expected: str
) -> None:
    """Alice's session has some id from 0 on: each of them is tried."""
    with guarded.undisturbed(expected):
        for session_id in range(4):
            for steal in (guarded.step(session_id), CloseSession(session_id)):
                async with guarded.as_bob() as bob:
                    said = RawPeer(Role.EDGE, bob.connection)  # which believes it is open
                    said.wire.send(guarded.hello)
                    said.wire.receive(cloud_hello(guarded))
                    said.wire.send(OpenSession(session_id, 64, "fp32", "fp32"))
                    said.wire.receive(opened_frame(guarded, session_id))
                    await bob.connection.send(*said.wire.send(steal))
                    reply = await refusal(bob)
                    assert (reply.code, reply.session_id) == (ErrorCode.PROTOCOL, None)


def opened_frame(guarded: Guarded, session_id: int) -> memoryview:
    edge = RawPeer(Role.EDGE, None)  # type: ignore[arg-type]  # only for what they write
    cloud = RawPeer(Role.CLOUD, None)  # type: ignore[arg-type]

    def deliver(message: Message, sender: RawPeer, receiver: RawPeer) -> memoryview:
        frame = memoryview(bytearray(b"".join(sender.wire.send(message))))
        receiver.wire.receive(frame)
        return frame

    deliver(guarded.hello, edge, cloud)
    deliver(replace(guarded.hello, role=Role.CLOUD), cloud, edge)
    deliver(OpenSession(session_id, 64, "fp32", "fp32"), edge, cloud)
    return deliver(SessionOpened(session_id, 64), cloud, edge)


@pytest.mark.parametrize("guess", ["x" * 43, "a" * 43, digest("a" * 43)])
async def test_a_resume_token_cannot_be_guessed(
    guarded: Guarded, expected: str, guess: str
) -> None:
    with guarded.undisturbed(expected):
        async with guarded.as_bob() as bob:
            await bob.say(OpenSession(0, 64, "fp32", "fp32", guess))
            assert (await bob.hear(SessionOpened)).num_positions == 0


async def test_a_resume_token_is_replayed_in_vain(guarded: Guarded, expected: str) -> None:
    with guarded.undisturbed(expected):
        async with guarded.as_bob() as bob:
            await bob.say(OpenSession(0, 64, "fp32", "fp32"))
            token = (await bob.hear(SessionOpened)).resume
        for _ in range(3):
            async with guarded.as_bob() as bob:
                await bob.say(OpenSession(0, 64, "fp32", "fp32", token))
                opened = await bob.hear(SessionOpened)
                assert opened.num_positions == 0
                assert opened.resume != token


# Memory


@pytest.mark.parametrize("nbytes", [2**26, 2**26 + 1, 2**32 - 1])
async def test_a_declared_size_is_no_memory(guarded: Guarded, expected: str, nbytes: int) -> None:
    """From strangers, as many as there may be."""
    before = guarded.resident_nbytes
    context = ssl.create_default_context(cafile=str(identity("cloud").certificate))
    with guarded.undisturbed(expected), ExitStack() as stack:
        for _ in range(40):
            plain = socket.create_connection(("127.0.0.1", guarded.port), timeout=10)
            encrypted = context.wrap_socket(stack.enter_context(plain), server_hostname="127.0.0.1")
            stack.enter_context(encrypted)
            encrypted.sendall(HEADER.pack(MAGIC, nbytes) + bytes(100))
        assert guarded.resident_nbytes - before < MEMORY_NBYTES


@pytest.mark.parametrize("codec", ["fp32+lz4", "int4+lz4"])
async def test_bombs_are_not_unpacked(guarded: Guarded, expected: str, codec: str) -> None:
    shapes = [(2**14, guarded.hidden_size), (1, 2**20), (2**20, 2**10)]
    before = guarded.resident_nbytes
    with guarded.undisturbed(expected):
        for rows, features in shapes:
            plain = min(plain_nbytes(codec, (rows, features)) or 0, 2**24)
            data = LZ4.compress(bytes(plain), store_size=False)
            async with guarded.as_bob() as bob:
                await bob.say(OpenSession(0, 64, "fp32", "fp32"))
                await bob.hear(SessionOpened)
                await bob.say(guarded.step(0, TensorPayload(codec, (rows, features), data)))
                assert (await refusal(bob)).code in (ErrorCode.PROTOCOL, ErrorCode.REQUEST)
        assert guarded.resident_nbytes - before < MEMORY_NBYTES


async def test_a_header_that_promises_more_than_there_is(guarded: Guarded, expected: str) -> None:
    def as_promised(layout: str, offset: int, value: int) -> Callable[[bytearray], None]:
        return lambda frame: struct.pack_into(layout, frame, offset, value)

    lies = [
        as_promised("<I", 4, 2**32 - 1),
        as_promised("<Q", 40, 2**63),
        *[as_promised("<I", offset, 2**32 - 1) for offset in (32, 36)],
    ]
    before = guarded.resident_nbytes
    with guarded.undisturbed(expected):
        for lie in lies:
            async with guarded.as_bob() as bob:
                await bob.say(OpenSession(0, 64, "fp32", "fp32"))
                await bob.hear(SessionOpened)
                frame = bytearray(b"".join(bob.wire.send(guarded.step(0))))
                lie(frame)
                await bob.connection.send(sealed(frame[:-4]))
                assert (await refusal(bob)).code is ErrorCode.PROTOCOL
        assert guarded.resident_nbytes - before < MEMORY_NBYTES


async def test_more_sessions_than_one_client_may_have(guarded: Guarded, expected: str) -> None:
    before = guarded.resident_nbytes
    with guarded.undisturbed(expected):
        async with guarded.as_bob() as bob:
            replies: list[object] = []
            for session_id in range(200):
                await bob.say(OpenSession(session_id, 512, "fp32", "fp32"))
                replies.append(await bob.hear(object))
            refused = [reply for reply in replies if isinstance(reply, ErrorReply)]
            assert len(refused) == 200 - 16
            assert {reply.code for reply in refused} == {ErrorCode.CAPACITY}
    assert guarded.resident_nbytes - before < MEMORY_NBYTES
