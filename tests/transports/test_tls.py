"""Who is let in over TLS, and who is not."""

from __future__ import annotations

import hashlib
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from privatelora.errors import (
    AuthError,
    ConnectError,
)
from privatelora.transports.base import Connection, Credentials, Handler, Limits
from privatelora.transports.registry import connect, listen
from tests.transports.certificates import issue
from tests.transports.support import echo, received, tells_trust
from tests.transports.tls_keyrings import Identity, identity, tls, trusting
from tests.transports.tls_support import (
    ANYWHERE,
    CLOUD,
    CLOUD_WITH_CLIENTS,
    EDGE,
    logged,
    port_of,
    round_trip,
)

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

# Who is let in


async def test_identities() -> None:
    """Each end knows the other by the SHA-256 of its certificate, as ``openssl x509`` shows it."""

    def fingerprint(name: str) -> str:
        der = ssl.PEM_cert_to_DER_cert(identity(name).certificate.read_text())
        return "tls:" + hashlib.sha256(der).hexdigest()

    found: list[str | None] = []

    async def note(connection: Connection) -> None:
        found.append(connection.identity)
        await connection.send(b"noted")

    for credentials in (CLOUD_WITH_CLIENTS, CLOUD):
        async with (
            await listen(ANYWHERE, note, Limits(), credentials) as listener,
            await connect(listener.address, Limits(), EDGE) as connection,
        ):
            assert await received(connection) == b"noted"
            assert connection.identity == fingerprint("cloud")
    assert found == [fingerprint("edge"), None]


Pair = tuple[Credentials, Credentials, str, str]


def _named(host: str) -> Pair:
    cloud = identity(f"cloud-at-{host}", (host,))
    return (
        cloud.trusting(None),
        trusting(cloud),
        r"its certificate is not for 127\.0\.0\.1; .*keys new NAME --host 127\.0\.0\.1",
        "it refuses this end's certificate (bad certificate)",
    )


def _listener_valid(first_day: int, last_day: int, reason: str, log: str) -> Pair:
    cloud = issue(days=(first_day, last_day))
    return cloud.trusting(None), trusting(cloud), reason, log


def _client_valid(first_day: int, last_day: int, reason: str, log: str) -> Pair:
    edge = issue(days=(first_day, last_day))
    cloud = identity("cloud")
    return cloud.trusting(edge.certificate), edge.trusting(cloud.certificate), reason, log


def _issued_by_a_trusted_client() -> Pair:
    """That a client is trusted does not make it an authority that lets in others."""
    return (
        CLOUD_WITH_CLIENTS,
        issue(issuer=identity("edge")).trusting(identity("cloud").certificate),
        "refuses this end's certificate|does not trust this end's certificate",
        "its certificate is not trusted here",
    )


REFUSALS: dict[str, Callable[[], Pair]] = {
    "name instead of IP": lambda: _named("localhost"),
    "other IP": lambda: _named("127.0.0.2"),
    "listener expired": lambda: _listener_valid(
        -2, -1, "its certificate has expired; .*clock", "refuses this end's certificate as expired"
    ),
    "listener not valid yet": lambda: _listener_valid(
        1, 2, "its certificate is not valid yet; .*clock", "it refuses this end's certificate"
    ),
    "client expired": lambda: _client_valid(
        -2, -1, "it refuses this end's certificate as expired", "its certificate has expired"
    ),
    "client not valid yet": lambda: _client_valid(
        1, 2, "it refuses this end's certificate", "its certificate is not valid yet"
    ),
    "listener unknown": lambda: (
        CLOUD,
        tls("edge", trust="stranger"),
        "its certificate is not trusted here .*; .*put its certificate into tls: trust",
        "it does not trust this end's certificate",
    ),
    "listener unknown to the system": lambda: (
        CLOUD,
        Credentials(),
        "its certificate is not trusted here",
        "it does not trust this end's certificate",
    ),
    "client without certificate": lambda: (
        CLOUD_WITH_CLIENTS,
        tls(trust="cloud"),
        "only peers with a certificate, and this end shows none; set tls: certificate and key",
        "it shows no certificate",
    ),
    "client unknown": lambda: (
        CLOUD_WITH_CLIENTS,
        tls("stranger", trust="cloud"),
        "it does not trust this end's certificate; put that among those it trusts",
        "its certificate is not trusted here",
    ),
    "issued by a trusted client": _issued_by_a_trusted_client,
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_refusals(name: str, own_errors: pytest.LogCaptureFixture) -> None:
    listener_keys, client_keys, reason, log = REFUSALS[name]()
    async with await listen(ANYWHERE, echo, Limits(), listener_keys) as listener:
        with pytest.raises(AuthError, match=f"^cannot connect to {listener.address}: .*{reason}"):
            await connect(listener.address, Limits(), client_keys)
        await logged(own_errors, f"{listener.address}: refused tls://127.0.0.1:", log)


@pytest.mark.parametrize(
    ("listen_host", "dialled", "in_certificate"),
    [
        ("127.0.0.1", "localhost", "localhost"),
        ("127.0.0.1", "LOCALHOST", "localhost"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        pytest.param(
            "[::1]", "[0:0::1]", "::1", marks=pytest.mark.skipif(not socket.has_dualstack_ipv6(),
            reason="no IPv6 here")
        ),
    ],
)  # fmt: skip
async def test_names_and_addresses(listen_host: str, dialled: str, in_certificate: str) -> None:
    cloud = identity(f"cloud-at-{in_certificate}", (in_certificate,))
    where = f"tls://{listen_host}:0"
    async with await listen(where, echo, Limits(), cloud.trusting(None)) as listener:
        await round_trip(f"tls://{dialled}:{port_of(listener.address)}", trusting(cloud))


async def test_certificates_of_an_authority() -> None:
    """Whoever trusts the authority trusts what it issued, also through one in between."""
    authority = issue(is_authority=True)
    between = issue(issuer=authority, is_authority=True)
    cloud, edge = issue(issuer=authority), issue(issuer=between, chain=(between,))
    listener_keys = cloud.trusting(authority.certificate)
    async with await listen(ANYWHERE, echo, Limits(), listener_keys) as listener:
        await round_trip(listener.address, edge.trusting(authority.certificate))


async def test_a_certificate_can_be_trusted_without_its_authority() -> None:
    authority = issue(is_authority=True)
    cloud, other = issue(issuer=authority), issue(issuer=authority)
    async with await listen(ANYWHERE, echo, Limits(), cloud.trusting(None)) as listener:
        await round_trip(listener.address, trusting(cloud))
        with pytest.raises(AuthError, match="not trusted here"):
            await connect(listener.address, Limits(), trusting(other))


# Changes without a restart


class Files(NamedTuple):
    """A listener's own files; ``clients`` is the folder of those it trusts."""

    identity: Identity
    clients: Path


@asynccontextmanager
async def listening_on_copies(
    folder: Path, handler: Handler = echo
) -> AsyncIterator[tuple[str, Files]]:
    """The address and the files of a listener that lets in the edge."""
    files = Files(Identity(folder / "tls.crt", folder / "tls.key"), folder / "clients")
    files.clients.mkdir()
    shutil.copy(identity("cloud").certificate, files.identity.certificate)
    shutil.copy(identity("cloud").key, files.identity.key)
    shutil.copy(identity("edge").certificate, files.clients / "edge.crt")
    (files.clients / "README.txt").write_text("not a certificate, and no matter")
    credentials = files.identity.trusting(files.clients)
    async with await listen(ANYWHERE, handler, Limits(), credentials) as listener:
        yield listener.address, files


async def test_clients_come_and_go_without_a_restart(tmp_path: Path) -> None:
    newcomer = tls("newcomer", trust="cloud")
    async with listening_on_copies(tmp_path) as (address, files):
        let_in = files.clients / "newcomer.pem"
        for _ in range(2):
            with pytest.raises(AuthError):
                await connect(address, Limits(), newcomer)
            shutil.copy(identity("newcomer").certificate, let_in)
            await round_trip(address, newcomer)
            await round_trip(address, EDGE)
            async with await connect(address, Limits(), newcomer) as lasting:
                let_in.unlink()
                with pytest.raises(AuthError):
                    await connect(address, Limits(), newcomer)
                # Whoever is in stays until somebody asks.
                await lasting.send(b"still here")
                assert await received(lasting) == b"still here"


async def test_who_is_in_is_not_trusted_any_more_when_a_file_has_changed(tmp_path: Path) -> None:
    async with (
        listening_on_copies(tmp_path, tells_trust) as (address, files),
        await connect(address, Limits(), EDGE) as early,
    ):
        await early.send(b"?")
        assert await received(early) == b"True"
        shutil.copy(identity("newcomer").certificate, files.clients / "newcomer.pem")
        await early.send(b"?")
        assert await received(early) == b"False"
        async with await connect(address, Limits(), EDGE) as late:
            await late.send(b"?")
            assert await received(late) == b"True"
            shutil.rmtree(files.clients)  # nobody at all
            await late.send(b"?")
            assert await received(late) == b"False"


async def test_without_anyone_to_trust_nobody_is_let_in(
    tmp_path: Path, own_errors: pytest.LogCaptureFixture
) -> None:
    async with listening_on_copies(tmp_path) as (address, files):
        for remove in ((files.clients / "edge.crt").unlink, partial(shutil.rmtree, files.clients)):
            remove()
            own_errors.clear()
            for credentials in (EDGE, tls(trust="cloud")):
                with pytest.raises(ConnectError, match=r"before TLS was set up; .*its log"):
                    await connect(address, Limits(), credentials)
            await logged(own_errors, address, str(files.clients))


async def test_the_listeners_certificate_is_renewed_without_a_restart(
    tmp_path: Path, own_errors: pytest.LogCaptureFixture
) -> None:
    renewed = identity("renewed cloud")
    async with listening_on_copies(tmp_path) as (address, files):
        await round_trip(address, EDGE)
        shutil.copy(renewed.key, files.identity.key)
        # Half done: nobody is let in, and the log says why.
        with pytest.raises(ConnectError, match=r"before TLS was set up; .*its log"):
            await connect(address, Limits(), EDGE)
        await logged(own_errors, address, str(files.identity.key), "does not belong to")
        shutil.copy(renewed.certificate, files.identity.certificate)
        with pytest.raises(AuthError):
            await connect(address, Limits(), EDGE)
        await round_trip(address, tls("edge", trust="renewed cloud"))


async def test_a_broken_trust_file_shuts_out_until_it_is_mended(
    tmp_path: Path, own_errors: pytest.LogCaptureFixture
) -> None:
    async with listening_on_copies(tmp_path) as (address, files):
        broken = files.clients / "broken.crt"
        broken.write_text("-----BEGIN CERTIFICATE-----\nMII")
        with pytest.raises(ConnectError):
            await connect(address, Limits(), EDGE)
        await logged(own_errors, address, str(broken), "replace or remove it")
        broken.unlink()
        await round_trip(address, EDGE)
