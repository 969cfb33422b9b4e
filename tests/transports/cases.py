"""The transports that the conformance suite runs against.

A new transport joins by adding a Case to CASES.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from dataclasses import dataclass

from privatelora.transports import registry
from privatelora.transports.base import Connection, Credentials, Handler, Limits, Listener

_numbers = itertools.count()
_LIMITS = Limits()
_NO_CREDENTIALS = Credentials()


@dataclass(frozen=True)
class Keyring:
    """What the ends of a connection prove themselves with, and ends that do not belong.

    ``strangers``: credentials that the listener, or a client of the real listener, must refuse.
    """

    listener: Credentials = _NO_CREDENTIALS
    client: Credentials = _NO_CREDENTIALS
    strangers: tuple[Credentials, ...] = ()


@dataclass(frozen=True)
class Case:
    """What the suite has to know about a transport.

    ``listen_address``: a listen address that is free. ``dead_address``: a contact address
    where nothing listens. ``cuts_frames``: whether a send can be interrupted after a part of
    its frame has left. ``keyring``: makes the keys at the first call, the same ones later.
    """

    name: str
    scheme: str
    listen_address: Callable[[], str]
    dead_address: Callable[[], str]
    cuts_frames: bool
    keyring: Callable[[], Keyring] = Keyring

    async def listen(
        self, handler: Handler, limits: Limits = _LIMITS, address: str | None = None
    ) -> Listener:
        """Listen on a free address, or on ``address``."""
        address = address or self.listen_address()
        return await registry.listen(address, handler, limits, self.keyring().listener)

    async def connect(self, address: str, limits: Limits = _LIMITS) -> Connection:
        """Connect as a client that belongs."""
        return await registry.connect(address, limits, self.keyring().client)


def free_tcp_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


CASES = [
    Case(
        name="inproc",
        scheme="inproc",
        listen_address=lambda: f"inproc://conformance-{next(_numbers)}",
        dead_address=lambda: f"inproc://nobody-{next(_numbers)}",
        cuts_frames=False,
    ),
    Case(
        name="tcp",
        scheme="tcp",
        listen_address=lambda: "tcp://127.0.0.1:0",
        dead_address=lambda: f"tcp://127.0.0.1:{free_tcp_port()}",
        cuts_frames=True,
    ),
]
