"""Files that TLS cannot use, and those that others could."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from privatelora.errors import (
    ConfigError,
)
from privatelora.transports.base import Credentials, Limits, TlsCredentials
from privatelora.transports.registry import connect, listen
from tests.transports.cases import free_tcp_port
from tests.transports.support import echo
from tests.transports.tls_keyrings import identity, tls
from tests.transports.tls_support import (
    ANYWHERE,
    logged,
    port_of,
)

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")


def _rsa_key(folder: Path) -> Path:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    path = folder / "rsa.key"
    path.write_bytes(
        rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    return path


def _locked_key(folder: Path) -> Path:
    from cryptography.hazmat.primitives import serialization

    path = folder / "locked.key"
    path.write_bytes(
        serialization.load_pem_private_key(identity("cloud").key.read_bytes(), None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    path.chmod(0o600)
    return path


def _file(folder: Path, text: str) -> Path:
    path = folder / "file"
    path.write_text(text)
    path.chmod(0o600)
    return path


def _empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


_own = TlsCredentials(*identity("cloud"))
BAD_FILES: dict[str, tuple[Callable[[Path], TlsCredentials], str]] = {
    "certificate missing": (
        lambda folder: replace(_own, certificate=folder / "no.crt"),
        r"cannot read the TLS certificate .*no\.crt: no such file.*; .*keys new",
    ),
    "key missing": (
        lambda folder: replace(_own, private_key=folder / "no.key"),
        r"cannot read the TLS private key .*no\.key: no such file.*; .*keys new",
    ),
    "key is a folder": (
        lambda folder: replace(_own, private_key=folder),
        "cannot read the TLS private key .*: is a directory; check the path",
    ),
    "key of another certificate": (
        lambda folder: replace(_own, private_key=identity("edge").key),
        r"private key .*edge\.key does not belong to the certificate .*cloud\.crt; ",
    ),
    "key of another kind": (
        lambda folder: replace(_own, private_key=_rsa_key(folder)),
        r"private key .*rsa\.key does not belong to the certificate .*cloud\.crt; ",
    ),
    "key with a pass phrase": (
        lambda folder: replace(_own, private_key=_locked_key(folder)),
        r"locked\.key has a pass phrase, .*openssl pkey -in .*locked\.key -out",
    ),
    "files swapped": (
        lambda folder: TlsCredentials(_own.private_key, _own.certificate),
        r"the TLS certificate .*cloud\.key holds no certificate in PEM format; ",
    ),
    "certificate instead of key": (
        lambda folder: replace(_own, private_key=_own.certificate),
        r"the TLS private key .*cloud\.crt holds no private key in PEM format; ",
    ),
    "damaged certificate": (
        lambda folder: replace(_own, certificate=_file(folder, "-----BEGIN CERTIFICATE-----\nx\n")),
        r"cannot use the TLS certificate .*file with the key .*cloud\.key \(.*\); ",
    ),
    "too large": (
        lambda folder: replace(_own, certificate=_file(folder, "x" * (2**20 + 1))),
        r"the TLS certificate .*file is larger than 1048576 bytes; name the right file",
    ),
    "no certificate": (
        lambda folder: TlsCredentials(private_key=_own.private_key),
        "needs a certificate and its key; the certificate is not set",
    ),
    "no key": (
        lambda folder: TlsCredentials(_own.certificate),
        "needs a certificate and its key; the private key is not set",
    ),
    "trust missing": (
        lambda folder: replace(_own, trust=folder / "nobody.crt"),
        r"cannot read the TLS trust .*nobody\.crt: no such file.*; check",
    ),
    "trust is empty": (
        lambda folder: replace(_own, trust=_empty_folder(folder)),
        r"trust folder .*empty holds no \*\.crt or \*\.pem file; put the certificates",
    ),
    "trust without certificates": (
        lambda folder: replace(_own, trust=_file(folder, "nothing here")),
        "the TLS trust file .*file does not hold certificates in PEM format; replace",
    ),
    "trust is binary": (
        lambda folder: replace(_own, trust=_file(folder, "\N{SNOWMAN}" * 50)),
        "the TLS trust file .*file does not hold certificates in PEM format; replace",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
async def test_unusable_files(name: str, tmp_path: Path) -> None:
    make, message = BAD_FILES[name]
    credentials = Credentials(make(tmp_path))
    address = f"tls://127.0.0.1:{free_tcp_port()}"
    with pytest.raises(ConfigError, match=message) as caught:
        await listen(address, echo, Limits(), credentials)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(address)))
    with pytest.raises(ConfigError, match=message):
        await connect(address, Limits(), credentials)


async def test_a_listener_needs_a_certificate() -> None:
    with pytest.raises(ConfigError, match=r"no certificate is set; .*keys new NAME --host"):
        await listen(ANYWHERE, echo)
    with pytest.raises(ConfigError, match="the certificate is not set"):
        await listen(ANYWHERE, echo, Limits(), tls(trust="edge"))


@pytest.mark.parametrize("mode", [0o640, 0o604])
async def test_a_key_that_others_can_read_is_noted(
    mode: int, tmp_path: Path, own_errors: pytest.LogCaptureFixture
) -> None:
    key = tmp_path / "open.key"
    shutil.copy(identity("cloud").key, key)
    key.chmod(mode)
    async with await listen(ANYWHERE, echo, Limits(), Credentials(replace(_own, private_key=key))):
        await logged(own_errors, f"{key} is open to other users (mode {mode:03o}): chmod 600")
