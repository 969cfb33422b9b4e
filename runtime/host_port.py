"""``host:port`` in the YAML files: where a small HTTP server listens."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator

from privatelora.errors import ConfigError
from privatelora.transports.address import Address, parse_address

NETWORK_SCHEMES = ("tcp", "tls", "zmq+tcp")
"""Addresses with a host and a port."""


def parse_host_port(text: str) -> tuple[str, int]:
    """Host and port of ``host:port``; port 0 is any free one. Raises ConfigError."""
    try:
        address = parse_address(f"http://{text}")
        address.require_options()
        host, port = address.require_listen()
    except ConfigError as error:
        raise ConfigError(f"expected host:port, such as 127.0.0.1:9464, not {text!r}") from error
    if host == "*":
        raise ConfigError("for all interfaces set 0.0.0.0:PORT or [::]:PORT, not '*'")
    return host, port


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_remote(address: Address) -> bool:
    """Whether other machines may reach what listens on ``address``."""
    return address.scheme in NETWORK_SCHEMES and not is_loopback(address.host)


def _check(text: str) -> str:
    try:
        parse_host_port(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


HostPort = Annotated[str, AfterValidator(_check)]
