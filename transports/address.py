"""Addresses: ``scheme://host:port``, ``scheme://name`` or ``scheme:///path``, with ``?options``.

One text form serves two purposes. A *contact address* is what a peer dials: a host that names
one machine and a port from 1. A *listen address* may also be a wildcard (``0.0.0.0``, ``[::]``
or ``*``, the last for IPv4 and IPv6 together) and may leave the port to the system with 0.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn
from urllib.parse import parse_qsl, urlencode

from privatelora.errors import ConfigError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
_FORBIDDEN = re.compile(r"[\s\x00-\x1f\x7f]")

_CONTACT_EXAMPLE = "{scheme}://192.0.2.7:8471 or {scheme}://[2001:db8::7]:8471"
_LISTEN_EXAMPLE = "{scheme}://0.0.0.0:8471, {scheme}://[::1]:0 or {scheme}://*:8471"
_NAME_EXAMPLE = "{scheme}://some-name"


@dataclass(frozen=True)
class Address:
    """A parsed address; ``str()`` gives the text back.

    ``host``: a name, an IPv4 address, an IPv6 address without brackets, ``*``, or "".
    ``port``: None where the text has none. ``path``: with its leading slash, or "".
    """

    scheme: str
    host: str = ""
    port: int | None = None
    path: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        query = f"?{urlencode(self.options)}" if self.options else ""
        return f"{self.scheme}://{host}{port}{self.path}{query}"

    @property
    def is_wildcard(self) -> bool:
        """Whether the host stands for every interface of a machine."""
        return self.host == "*" or (_is_ip(self.host) and _unspecified(self.host))

    def require_contact(self) -> tuple[str, int]:
        """Host and port to dial. Raises ConfigError if nothing can be reached there."""
        host, port = self._require_host_port(_CONTACT_EXAMPLE)
        if self.is_wildcard:
            self._refuse(
                f"{host} means every interface and can only be listened on; "
                "to connect, name the machine",
                _CONTACT_EXAMPLE,
            )
        if port == 0:
            self._refuse(
                "port 0 lets a listener choose a free port; to connect, give the port it chose",
                _CONTACT_EXAMPLE,
            )
        return host, port

    def require_listen(self) -> tuple[str, int]:
        """Host (possibly a wildcard) and port (possibly 0). Raises ConfigError."""
        return self._require_host_port(_LISTEN_EXAMPLE)

    def require_name(self) -> str:
        """The name in ``scheme://name``. Raises ConfigError if there is more or less."""
        if not self.host or self.port is not None or self.path:
            self._refuse("expected a name and nothing else", _NAME_EXAMPLE)
        if not _NAME.fullmatch(self.host):
            self._refuse(
                f"{self.host!r} is not a name (letters, digits, '.', '_', '-')", _NAME_EXAMPLE
            )
        return self.host

    def require_options(self, *known: str) -> None:
        """Refuse options other than ``known`` with a ConfigError."""
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            accepted = ", ".join(known) if known else "none"
            raise ConfigError(
                f"address {str(self)!r}: unknown option {unknown[0]!r}; "
                f"{self.scheme} takes {accepted}"
            )

    def _require_host_port(self, example: str) -> tuple[str, int]:
        if self.path:
            self._refuse(f"unexpected path {self.path!r} after the port", example)
        if not self.host:
            self._refuse("the host is missing", example)
        if self.port is None:
            self._refuse("the port is missing", example)
        return self.host, self.port

    def _refuse(self, reason: str, example: str) -> NoReturn:
        raise _bad(str(self), reason, example.format(scheme=self.scheme))


def parse_address(text: str) -> Address:
    """Parse ``text``. Raises ConfigError that says what is wrong and shows an example.

    What a scheme needs (a port, a name, a path) is for its transport to require.
    """
    example = _CONTACT_EXAMPLE.format(scheme="tcp")
    if _FORBIDDEN.search(text):
        raise _bad(text, "it contains white space or control characters", example)
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise _bad(text, "it must start with a scheme and '://'", example)
    if not _SCHEME.fullmatch(scheme):
        raise _bad(text, f"{scheme!r} is not a scheme (lower-case letters first)", example)
    example = _CONTACT_EXAMPLE.format(scheme=scheme)
    if "#" in rest:
        raise _bad(text, "'#' has no meaning in an address", example)
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        raise _bad(text, "credentials do not belong in an address", example)
    host, port = _split_host_port(text, authority, example)
    return Address(scheme, host, port, slash + path, _parse_options(text, query, example))


def _split_host_port(text: str, authority: str, example: str) -> tuple[str, int | None]:
    if authority.startswith("["):
        host, bracket, after = authority[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise _bad(text, "'[' starts an IPv6 address that must end in ']' or ']:port'", example)
        if ":" not in host or not _is_ip(host):
            raise _bad(text, f"{host!r} is not an IPv6 address", example)
        separator, port = after[:1], after[1:]
    else:
        host, separator, port = authority.partition(":")
        if ":" in port:
            raise _bad(text, "an IPv6 address must stand in brackets", example)
        if host and host != "*" and not _NAME.fullmatch(host):
            raise _bad(text, f"{host!r} is not a host name", example)
    if not separator:
        return host, None
    if not (port.isascii() and port.isdigit()):
        raise _bad(text, f"the port must be a number, not {port!r}", example)
    if len(port) > 5 or int(port) > 65535:
        raise _bad(text, f"port {port} is not between 0 and 65535", example)
    return host, int(port)


def _parse_options(text: str, query: str, example: str) -> dict[str, str]:
    options: dict[str, str] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise _bad(text, "options after '?' must read name=value&name=value", example) from error
    for name, value in pairs:
        if name in options:
            raise _bad(text, f"option {name!r} is given twice", example)
        options[name] = value
    return options


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _unspecified(host: str) -> bool:
    return ipaddress.ip_address(host).is_unspecified


def _bad(text: str, reason: str, example: str) -> ConfigError:
    return ConfigError(f"address {text!r} is not usable: {reason}; for example: {example}")
