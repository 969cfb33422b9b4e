"""Tokens by which a cloud knows its clients: made, kept as digests, recognised, sent with care.

A cloud keeps SHA-256 digests only, so its file is worth nothing to a thief. Tokens are random and
long, so a digest cannot be guessed back, and how long a comparison of digests takes tells nothing
about a token.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from privatelora.errors import AuthError, ConfigError
from privatelora.runtime.host_port import is_loopback
from privatelora.runtime.secret_config import SecretConfig
from privatelora.runtime.wire.control import check_token
from privatelora.runtime.wire.prelude import MalformedError
from privatelora.transports.address import Address, parse_address
from privatelora.transports.base import Connection
from privatelora.yaml_file import read_mapping

logger = logging.getLogger(__name__)

MAX_TOKENS = 10_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a client may be called."""

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ON_THIS_MACHINE = frozenset({"inproc", "shm", "unix", "zmq+ipc"})
_ENCRYPTED = frozenset({"tls"})
_ENCRYPTED_WITH_CURVE = frozenset({"zmq+tcp", "zmq+ipc"})


def new_token() -> str:
    """A token that nobody can guess: 256 random bits."""
    return secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """What a cloud keeps of a token: its SHA-256 in lower-case hexadecimal digits."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """Whose tokens a cloud knows."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """``names`` of clients by the digests of their tokens."""
        self._names = dict(names)

    def name_of(self, token: str) -> str | None:
        """Whose token this is, if it is anybody's."""
        return self._names.get(digest(token))


class KnownTokens(Protocol):
    """What ``identify`` asks."""

    def name_of(self, token: str) -> str | None:
        """Whose token this is, if it is anybody's."""


class TokensFile:
    """The tokens in a cloud's file, read again when it has changed.

    So a client is let in or shut out without a restart. A file that cannot be used any more is
    reported, and what it said before holds.
    """

    def __init__(self, path: Path) -> None:
        """Read it; raises as ``load_tokens``."""
        self._path = path
        self._state = self._stat()
        self._tokens = load_tokens(path)

    def name_of(self, token: str) -> str | None:
        """See ``KnownTokens``."""
        state = self._stat()
        if state != self._state:
            self._state = state
            try:
                self._tokens = load_tokens(self._path)
                logger.info("%s was read again", self._path)
            except ConfigError as error:
                logger.error("%s; what it said before holds", error)
        return self._tokens.name_of(token)

    def _stat(self) -> tuple[int, ...]:
        try:
            now = self._path.stat()
        except OSError as error:
            return (error.errno or 0,)
        return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


def load_tokens(path: Path) -> Tokens:
    """Read a cloud's file of tokens, ``name: digest`` lines in YAML.

    Raises ConfigError that says what is wrong with it, and where.
    """
    digests = read_mapping(path, "alice")
    if not 0 < len(digests) <= MAX_TOKENS:
        raise ConfigError(
            f"{path}: {len(digests)} tokens; 1 to {MAX_TOKENS} are possible, and privatelora keys "
            "token NAME makes one"
        )
    names: dict[str, str] = {}
    for name, value in digests.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: {name!r} cannot name a client; use up to 64 letters, digits, '.', '_', "
                "'-', in quotes if they are a number"
            )
        if not isinstance(value, str) or not _DIGEST.fullmatch(value):
            # What stands there may be the token itself, which is nobody's business.
            raise ConfigError(
                f"{path}: {name}: not a SHA-256 digest of 64 lower-case hexadecimal digits; use "
                "the line that privatelora keys token printed"
            )
        if value in names:
            raise ConfigError(f"{path}: {names[value]} and {name} have the same token")
        names[value] = name
    return Tokens(names)


def identify(connection: Connection, token: str | None, tokens: KnownTokens | None) -> str:
    """On whose account a connection runs.

    What it has proven to be by its transport; else, if the cloud has ``tokens``, whose token it
    sent; else its machine. Raises AuthError for an edge without a token that is known.
    """
    if connection.identity is not None:
        return connection.identity
    if tokens is None:
        address = parse_address(connection.peer.partition(" ")[0])
        return f"{address.scheme}://{address.host}"
    if token is None:
        raise AuthError(
            "this cloud lets in edges with a token only, and none was sent; set token in the "
            "edge's settings"
        )
    name = tokens.name_of(token)
    if name is None:
        raise AuthError(
            "this cloud does not know the token that was sent; its tokens file needs the line "
            "that privatelora keys token printed, and the edge that token"
        )
    return f"token:{name}"


def token_to_send(secret: SecretConfig, cloud: str, *, with_curve: bool) -> SecretStr:
    """Read the token that an edge sends to ``cloud``, an address, perhaps encrypted by CURVE.

    Raises ConfigError if there is none, or somebody on the way there could read it.
    """
    address = parse_address(cloud)
    if not _is_private(address, with_curve):
        raise ConfigError(
            f"the token would go to {cloud} unencrypted, for others to read on the way; use "
            "tls://, or zmq+tcp:// with curve"
        )
    token = secret.read()
    try:
        check_token(token.get_secret_value())
    except MalformedError as error:
        raise ConfigError(f"what the setting token names cannot be one: {error}") from error
    return token


def _is_private(address: Address, with_curve: bool) -> bool:
    """Whether nobody between here and ``address`` can read along."""
    if address.scheme in _ENCRYPTED or address.scheme in _ON_THIS_MACHINE:
        return True
    if with_curve and address.scheme in _ENCRYPTED_WITH_CURVE:
        return True
    return is_loopback(address.host)
