"""The transports that the conformance suite runs against.

A new transport joins by adding a Case to CASES.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from dataclasses import dataclass

_numbers = itertools.count()


@dataclass(frozen=True)
class Case:
    """What the suite has to know about a transport.

    ``listen_address``: a listen address that is free. ``dead_address``: a contact address
    where nothing listens. ``cuts_frames``: whether a send can be interrupted after a part of
    its frame has left.
    """

    scheme: str
    listen_address: Callable[[], str]
    dead_address: Callable[[], str]
    cuts_frames: bool


def free_tcp_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


CASES = [
    Case(
        scheme="inproc",
        listen_address=lambda: f"inproc://conformance-{next(_numbers)}",
        dead_address=lambda: f"inproc://nobody-{next(_numbers)}",
        cuts_frames=False,
    ),
    Case(
        scheme="tcp",
        listen_address=lambda: "tcp://127.0.0.1:0",
        dead_address=lambda: f"tcp://127.0.0.1:{free_tcp_port()}",
        cuts_frames=True,
    ),
]
