"""The transports that the conformance suite runs against.

A new transport joins by adding a Case to CASES.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from privatelora.transports import registry
from privatelora.transports.base import (
    NO_CREDENTIALS,
    Connection,
    Credentials,
    Handler,
    Limits,
    Listener,
)
from privatelora.transports.emulated_link import Impairment
from privatelora.transports.impaired import impaired
from tests.transports import third_party
from tests.transports.curve_keyrings import curve
from tests.transports.tls_keyrings import tls

_numbers = itertools.count()
_LIMITS = Limits()
_SHORT_DELAY = Impairment(delay_ms=0.5, jitter_ms=0.2)


@dataclass(frozen=True)
class Keyring:
    """What the ends of a connection prove themselves with, and ends that do not belong.

    ``strangers``: credentials that the listener, or a client of the real listener, must refuse.
    """

    listener: Credentials = NO_CREDENTIALS
    client: Credentials = NO_CREDENTIALS
    strangers: tuple[Credentials, ...] = ()


@dataclass(frozen=True)
class Case:
    """What the suite has to know about a transport.

    ``listen_address``: a listen address that is free. ``dead_address``: a contact address
    where nothing listens. ``cuts_frames``: whether a part of a frame leaves while the one before
    it is not taken, so that its send can be interrupted in mid-frame. ``keyring``: makes the
    keys at the first call, the same ones later. ``mechanisms``: the credentials that the scheme
    can use, by the names of their fields. ``wrap``: what becomes of a client's connection.
    """

    name: str
    scheme: str
    listen_address: Callable[[], str]
    dead_address: Callable[[], str]
    cuts_frames: bool
    keyring: Callable[[], Keyring] = Keyring
    mechanisms: tuple[str, ...] = ()
    wrap: Callable[[Connection, Limits], Connection] | None = None

    async def listen(
        self, handler: Handler, limits: Limits = _LIMITS, address: str | None = None
    ) -> Listener:
        """Listen on a free address, or on ``address``."""
        address = address or self.listen_address()
        return await registry.listen(address, handler, limits, self.keyring().listener)

    async def connect(self, address: str, limits: Limits = _LIMITS) -> Connection:
        """Connect as a client that belongs."""
        connection = await registry.connect(address, limits, self.keyring().client)
        return connection if self.wrap is None else self.wrap(connection, limits)


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
        name="shm",
        scheme="shm",
        listen_address=lambda: f"shm://conformance-{os.getpid()}-{next(_numbers)}",
        dead_address=lambda: f"shm://nobody-{os.getpid()}-{next(_numbers)}",
        cuts_frames=True,
    ),
    Case(
        name="tcp",
        scheme="tcp",
        listen_address=lambda: "tcp://127.0.0.1:0",
        dead_address=lambda: f"tcp://127.0.0.1:{free_tcp_port()}",
        cuts_frames=True,
    ),
    Case(
        name="impaired+tcp",
        scheme="tcp",
        listen_address=lambda: "tcp://127.0.0.1:0",
        dead_address=lambda: f"tcp://127.0.0.1:{free_tcp_port()}",
        cuts_frames=True,
        wrap=partial(impaired, send=Impairment(), receive=Impairment(), seed=1),
    ),
    Case(
        name="delayed+tcp",
        scheme="tcp",
        listen_address=lambda: "tcp://127.0.0.1:0",
        dead_address=lambda: f"tcp://127.0.0.1:{free_tcp_port()}",
        cuts_frames=True,
        wrap=partial(impaired, send=_SHORT_DELAY, receive=_SHORT_DELAY, seed=1),
    ),
    Case(
        name="tls",
        scheme="tls",
        listen_address=lambda: "tls://127.0.0.1:0",
        dead_address=lambda: f"tls://127.0.0.1:{free_tcp_port()}",
        cuts_frames=True,
        mechanisms=("tls",),
        keyring=lambda: Keyring(
            listener=tls("cloud"),
            client=tls(trust="cloud"),
            strangers=(NO_CREDENTIALS, tls(trust="edge"), tls("edge", trust="stranger")),
        ),
    ),
    Case(
        name="tls with client certificates",
        scheme="tls",
        listen_address=lambda: "tls://127.0.0.1:0",
        dead_address=lambda: f"tls://127.0.0.1:{free_tcp_port()}",
        cuts_frames=True,
        mechanisms=("tls",),
        keyring=lambda: Keyring(
            listener=tls("cloud", trust="edge"),
            client=tls("edge", trust="cloud"),
            strangers=(
                NO_CREDENTIALS,
                tls(trust="cloud"),
                tls("stranger", trust="cloud"),
                tls("edge", trust="stranger"),
            ),
        ),
    ),
    Case(
        name="zmq+tcp",
        scheme="zmq+tcp",
        listen_address=lambda: "zmq+tcp://127.0.0.1:0",
        dead_address=lambda: f"zmq+tcp://127.0.0.1:{free_tcp_port()}",
        cuts_frames=False,
        mechanisms=("curve",),
    ),
    Case(
        name="zmq+ipc",
        scheme="zmq+ipc",
        listen_address=lambda: f"zmq+ipc://conformance-{os.getpid()}-{next(_numbers)}",
        dead_address=lambda: f"zmq+ipc://nobody-{os.getpid()}-{next(_numbers)}",
        cuts_frames=False,
        mechanisms=("curve",),
    ),
    Case(
        name="zmq+tcp with CURVE",
        scheme="zmq+tcp",
        listen_address=lambda: "zmq+tcp://127.0.0.1:0",
        dead_address=lambda: f"zmq+tcp://127.0.0.1:{free_tcp_port()}",
        cuts_frames=False,
        mechanisms=("curve",),
        keyring=lambda: Keyring(
            listener=curve("cloud", trust="edge"),
            client=curve("edge", trust="cloud"),
            strangers=(
                NO_CREDENTIALS,
                curve("stranger", trust="cloud"),
                curve("edge", trust="stranger"),
            ),
        ),
    ),
    Case(
        name="third-party unix",
        scheme="unix",
        listen_address=third_party.free_address,
        dead_address=third_party.free_address,
        cuts_frames=True,
    ),
]
