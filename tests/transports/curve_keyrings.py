"""CURVE keys for tests, made once per run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from privatelora.transports.base import Credentials, CurveCredentials
from privatelora.transports.curve_keys import new_curve_key
from tests.transports.tls_keyrings import keys_folder


@cache
def curve_pair(name: str) -> tuple[Path, Path]:
    """The secret and the public key file of an end; the same at every call."""
    secret, public = keys_folder() / f"curve-{name}.key", keys_folder() / f"curve-{name}.pub"
    new_curve_key(secret, public)
    return secret, public


def curve(identity: str, trust: str) -> Credentials:
    """Credentials of ``identity``, with trust in the key of ``trust``."""
    return Credentials(curve=CurveCredentials(curve_pair(identity)[0], curve_pair(trust)[1]))
