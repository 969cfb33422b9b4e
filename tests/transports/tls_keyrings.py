"""Certificates for tests, made once per run."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from privatelora.transports.base import Credentials, TlsCredentials
from privatelora.transports.tls_keys import new_certificate

HOSTS = ("127.0.0.1", "localhost", "::1")


class Identity(NamedTuple):
    """A certificate and its key."""

    certificate: Path
    key: Path

    def trusting(self, trust: Path | None) -> Credentials:
        """Credentials of this identity."""
        return Credentials(TlsCredentials(self.certificate, self.key, trust))


@cache
def keys_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="privatelora-test-keys-")
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


@cache
def identity(name: str, hosts: tuple[str, ...] = HOSTS) -> Identity:
    """A certificate as ``privatelora keys new`` makes it; the same one for the same name."""
    found = Identity(keys_folder() / f"{name}.crt", keys_folder() / f"{name}.key")
    new_certificate(found.key, found.certificate, name, hosts, days=1)
    return found


def trusting(peer: Identity) -> Credentials:
    """Credentials of a client that trusts ``peer`` and shows no certificate."""
    return Credentials(TlsCredentials(trust=peer.certificate))


def tls(name: str | None = None, trust: str | None = None) -> Credentials:
    """Credentials of the identity ``name``, with trust in the certificate of another."""
    trusted = None if trust is None else identity(trust).certificate
    if name is None:
        return Credentials(TlsCredentials(trust=trusted))
    return identity(name).trusting(trusted)
