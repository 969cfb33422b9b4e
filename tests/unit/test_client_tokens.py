"""Tokens: who a cloud takes an edge for, and where an edge sends one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml
from pydantic import SecretStr

from privatelora.errors import AuthError, ConfigError
from privatelora.runtime.client_tokens import (
    Tokens,
    digest,
    identify,
    load_tokens,
    new_token,
    token_to_send,
)
from privatelora.runtime.secret_config import SecretConfig
from privatelora.runtime.wire.messages import ErrorCode, Fingerprints, Hello, Role
from privatelora.transports.base import Connection, Limits
from privatelora.transports.registry import connect
from tests.unit.peers import RawEdge
from tests.unit.world import PRINTS, World, serving, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

ALICE, BOB = new_token(), new_token()
KNOWN = Tokens({digest(ALICE): "alice", digest(BOB): "bob"})


def hello(token: str | None, fingerprints: Fingerprints = PRINTS) -> Hello:
    return Hello(Role.EDGE, "raw edge", fingerprints, ("fp32",), 2**20, token=token)


class Proven:
    """A connection whose transport has shown who the peer is."""

    identity = "curve:abc"
    peer = "zmq+tcp://192.0.2.7:1"


# At the cloud


async def test_a_known_token_is_a_client_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    split = world()
    service = split.service(tokens=KNOWN)
    with caplog.at_level(logging.DEBUG):
        async with serving(service.handle) as address:
            for token, name in ((ALICE, "alice"), (BOB, "bob")):
                async with await connect(address, Limits()) as connection:
                    edge = RawEdge(split, connection)
                    await edge.say(hello(token))
                    await edge.hear(Hello)
                    await edge.open(0)
                assert f"joined as token:{name}" in caplog.text
    assert ALICE not in caplog.text
    assert BOB not in caplog.text


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "this cloud lets in edges with a token only, and none was sent"),
        (new_token(), "this cloud does not know the token that was sent"),
        (digest(ALICE), "this cloud does not know the token that was sent"),
    ],
    ids=["none", "unknown", "its digest"],
)
async def test_without_a_known_token_nothing_is_told(
    caplog: pytest.LogCaptureFixture, token: str | None, message: str
) -> None:
    """Not even whether the shards would fit."""
    split: World = world()
    async with serving(split.service(tokens=KNOWN).handle) as address:
        for prints in (PRINTS, Fingerprints("d" * 64, "d" * 64, "d" * 64)):
            async with await connect(address, Limits()) as connection:
                edge = RawEdge(split, connection)
                await edge.say(hello(token, prints))
                error = await edge.hear_error()
            assert (error.code, error.session_id) == (ErrorCode.AUTH, None)
            assert message in error.message
            assert error.message in caplog.text
    assert token is None or token not in caplog.text


async def test_an_edge_of_ours_comes_in_with_its_token() -> None:
    split = world()
    async with serving(split.service(tokens=KNOWN).handle) as address:
        model = split.split(address, token=lambda: SecretStr(ALICE))
        sequence = await model.open_sequence(64)
        await sequence.forward([1, 2, 3], 0, "last")
        await model.aclose()
        for token in (None, lambda: SecretStr("a" * 43)):
            model = split.split(address, token=token)
            with pytest.raises(AuthError, match="this cloud"):
                await model.open_sequence(64)
            await model.aclose()


def test_what_the_transport_has_proven_needs_no_token() -> None:
    connection: Connection = Proven()  # type: ignore[assignment]
    for token in (None, ALICE, "unknown"):
        for tokens in (None, KNOWN):
            assert identify(connection, token, tokens) == "curve:abc"


def test_a_cloud_without_tokens_goes_by_machines() -> None:
    class Plain(Proven):
        identity = None  # type: ignore[assignment]

    connection: Connection = Plain()  # type: ignore[assignment]
    assert identify(connection, ALICE, None) == "zmq+tcp://192.0.2.7"
    assert identify(connection, ALICE, KNOWN) == "token:alice"


# The file

FINE = digest("a")
BAD_FILES = {
    "empty": ("", "0 tokens; 1 to 10000 are possible, and privatelora keys token NAME makes one"),
    "list": ("- alice", "expected keys and values, such as 'alice: ...'"),
    "no YAML": ("alice: [", "not valid YAML"),
    "the token itself": (f"alice: {ALICE}", "alice: not a SHA-256 digest of 64 lower-case"),
    "capitals": (f"alice: {FINE.upper()}", "alice: not a SHA-256 digest"),
    "cut off": (f"alice: {FINE[:-1]}", "alice: not a SHA-256 digest"),
    "a number": ("alice: 7", "alice: not a SHA-256 digest"),
    "nothing": ("alice:", "alice: not a SHA-256 digest"),
    "nested": (f"alice: {{token: {FINE}}}", "alice: not a SHA-256 digest"),
    "name with spaces": (f"al ice: {FINE}", "'al ice' cannot name a client"),
    "name is a number": (f"7: {FINE}", "7 cannot name a client; use up to 64"),
    "name too long": (f"{'x' * 65}: {FINE}", "cannot name a client"),
    "twice the same": (f"alice: {FINE}\nbob: {FINE}", "alice and bob have the same token"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_wrong(tmp_path: Path, name: str) -> None:
    text, message = BAD_FILES[name]
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_tokens(path)
    said = str(caught.value)
    assert message in said
    assert said.startswith(f"{path}")
    assert len(said.splitlines()) == 1
    assert ALICE not in said


def test_too_many_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text("".join(f"n{i}: {i:064x}\n" for i in range(10_001)))
    with pytest.raises(ConfigError, match=r"10001 tokens|larger than"):
        load_tokens(path)


def test_a_file_that_is_right(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(yaml.safe_dump({"alice": digest(ALICE), "bob": digest(BOB)}))
    tokens = load_tokens(path)
    assert [tokens.name_of(token) for token in (ALICE, BOB, "x")] == ["alice", "bob", None]


# At the edge


@pytest.mark.parametrize(
    ("cloud", "with_curve", "is_sent"),
    [
        ("tls://cloud.example:1", False, True),
        ("tls://192.0.2.7:1", False, True),
        ("zmq+tcp://192.0.2.7:1", True, True),
        ("zmq+tcp://192.0.2.7:1", False, False),
        ("tcp://192.0.2.7:1", False, False),
        ("tcp://192.0.2.7:1", True, False),
        ("tcp://cloud.example:1", False, False),
        ("tcp://localhost.example:1", False, False),
        ("tcp://localhost:1", False, True),
        ("tcp://127.0.0.1:1", False, True),
        ("tcp://127.5.0.1:1", False, True),
        ("tcp://[::1]:1", False, True),
        ("tcp://[2001:db8::7]:1", False, False),
        ("zmq+tcp://127.0.0.1:1", False, True),
        ("zmq+ipc:///tmp/cloud.sock", False, True),
        ("shm://cloud", False, True),
        ("inproc://cloud", False, True),
        ("elsewhere://cloud", False, False),
    ],
)
def test_a_token_goes_where_nobody_reads_along(
    monkeypatch: pytest.MonkeyPatch, cloud: str, with_curve: bool, is_sent: bool
) -> None:
    monkeypatch.setenv("TEST_TOKEN", f" {ALICE}\n")
    secret = SecretConfig(env="TEST_TOKEN")
    if is_sent:
        token = token_to_send(secret, cloud, with_curve=with_curve)
        assert token.get_secret_value() == ALICE
        assert ALICE not in f"{token!r} {token}"
        return
    with pytest.raises(ConfigError, match="unencrypted, for others to read on the way; use tls://"):
        token_to_send(secret, cloud, with_curve=with_curve)


@pytest.mark.parametrize("text", ["two words", "caf\xe9", "x" * 257])
def test_a_secret_that_cannot_be_a_token(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TEST_TOKEN", text)
    with pytest.raises(ConfigError, match="the setting token names cannot be one") as caught:
        token_to_send(SecretConfig(env="TEST_TOKEN"), "tls://h:1", with_curve=False)
    assert text not in str(caught.value)
