"""The transports of a chaos run: addresses of both ends, keys, and what a relay can do there."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.chaos.faults import ON_BYTES, ON_DAEMONS, ON_SOCKETS
from tests.chaos.relay import Endpoint, Relay
from tests.e2e.test_transports import as_yaml
from tests.transports.cases import Keyring, free_tcp_port
from tests.transports.curve_keyrings import curve
from tests.transports.tls_keyrings import tls

_numbers = itertools.count()


@dataclass(frozen=True)
class Setup:
    """A cloud's address, the one at which its edge finds it, and a relay in between."""

    listen: str
    contact: str
    relay: Relay
    cloud_settings: dict[str, Any]
    edge_settings: dict[str, Any]


@dataclass(frozen=True)
class Transport:
    """One that two processes can use. ``kinds``: faults that can be made there."""

    name: str
    scheme: str
    kinds: tuple[str, ...]
    keyring: Callable[[], Keyring] = Keyring

    def set_up(self) -> Setup:
        """Choose free addresses."""
        keyring = self.keyring()
        names = [self._place() for _ in range(2)]
        (listen, far), (contact, near) = names
        return Setup(
            listen,
            contact,
            Relay(near, far),
            as_yaml(keyring.listener),
            as_yaml(keyring.client),
        )

    def _place(self) -> tuple[str, Endpoint]:
        """An address, and what it is to a plain socket."""
        if self.scheme in ("shm", "zmq+ipc"):
            name = f"chaos-{os.getpid()}-{next(_numbers)}"
            kind = socket.SOCK_SEQPACKET if self.scheme == "shm" else socket.SOCK_STREAM
            prefix = {"shm": "privatelora-shm", "zmq+ipc": "privatelora-zmq"}[self.scheme]
            endpoint = Endpoint(socket.AF_UNIX, kind, f"\0{prefix}/{name}")
            return f"{self.scheme}://{name}", endpoint
        port = free_tcp_port()
        endpoint = Endpoint(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port))
        return f"{self.scheme}://127.0.0.1:{port}", endpoint


_EVERYTHING = (*ON_DAEMONS, *ON_BYTES)

TRANSPORTS = (
    Transport("tcp", "tcp", _EVERYTHING),
    Transport(
        "tls", "tls", _EVERYTHING, lambda: Keyring(tls("cloud", "edge"), tls("edge", "cloud"))
    ),
    Transport("zmq+tcp", "zmq+tcp", _EVERYTHING),
    Transport(
        "zmq+tcp+curve",
        "zmq+tcp",
        _EVERYTHING,
        lambda: Keyring(curve("cloud", "edge"), curve("edge", "cloud")),
    ),
    Transport("zmq+ipc", "zmq+ipc", _EVERYTHING),
    Transport("shm", "shm", (*ON_DAEMONS, *ON_SOCKETS)),
)
