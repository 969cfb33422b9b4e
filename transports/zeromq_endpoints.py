"""Where ZeroMQ ends are, and who is behind one.

``zmq+ipc://name`` is the abstract socket ``privatelora-zmq/name`` of Linux. A socket file would be
left behind by a process that is killed, and ZeroMQ takes over one that is in use.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from typing import NamedTuple

import zmq

from privatelora.errors import AuthError, ConfigError, ConnectError
from privatelora.transports.address import Address
from privatelora.transports.sockets import Endpoint

_BACKLOG = 1024  # while it is full ZeroMQ reports that nothing listens
_MAX_NAME_NBYTES = 107  # of an abstract socket: unix(7)


class PeerProcess(NamedTuple):
    """A process of this machine."""

    number: int
    user: int

    def __str__(self) -> str:
        return f"process {self.number} of user {self.user}"


def ipc_sockaddr(address: Address) -> str:
    """What a plain socket binds or connects to for ``zmq+ipc://name``. Raises ConfigError."""
    name = address.require_name()
    if sys.platform != "linux":
        raise ConfigError(
            f"{address} needs the abstract sockets of Linux; use zmq+tcp://127.0.0.1:port here"
        )
    sockaddr = f"\0privatelora-zmq/{name}"
    if len(sockaddr) > _MAX_NAME_NBYTES:
        raise ConfigError(
            f"{address} is too long: the name may have "
            f"{_MAX_NAME_NBYTES - len(sockaddr) + len(name)} characters"
        )
    return sockaddr


def open_ipc_listener(address: Address) -> socket.socket:
    """A listening socket for ``zmq+ipc://name``. Raises ConfigError or ConnectError."""
    sockaddr = ipc_sockaddr(address)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        sock.bind(sockaddr)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        hint = "check the system's limits"
        if error.errno == errno.EADDRINUSE:
            hint = "stop the program that listens there or choose another name"
        raise ConnectError(
            f"cannot listen on {address}: {os.strerror(error.errno or 0).lower()}; {hint}"
        ) from error
    return sock


def endpoint_text(endpoint: Endpoint) -> str:
    """What ZeroMQ calls the address that ``bind`` and ``connect`` of a plain socket take."""
    family, sockaddr = endpoint
    if family == socket.AF_UNIX:
        return "ipc://@" + os.fsdecode(sockaddr).removeprefix("\0")
    host, port = sockaddr[:2]
    return f"tcp://[{host}]:{port}" if family == socket.AF_INET6 else f"tcp://{host}:{port}"


def peer_host(frame: zmq.Frame) -> str:
    """The IP address that a message came from; "" if it was gone too soon."""
    return _metadata(frame, "Peer-Address")


def peer_key(frame: zmq.Frame) -> str:
    """The public key that the sender has proven to own. Raises AuthError if it has not."""
    key = _metadata(frame, "User-Id")
    if not key:
        raise AuthError("it has not shown a CURVE key")
    return key


def peer_process(frame: zmq.Frame) -> PeerProcess | None:
    """Who sent a message over IPC, as the system vouches; None if it was gone too soon."""
    # libzmq appends what SO_PEERCRED says: "localhost:<user>:<group>:<process>"
    numbers = _metadata(frame, "Peer-Address").split(":")[1:]
    if len(numbers) != 3:
        return None
    user, _group, process = map(int, numbers)
    return PeerProcess(process, user)


def peer_descriptor(frame: zmq.Frame) -> int:
    """The descriptor that a message was read from; -1 if its sender was gone too soon."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return -1


def is_own_user(process: PeerProcess | None) -> bool:
    """Whether that process and this one run as the same user.

    Abstract sockets have no permissions: any user of this machine can connect to one, or listen
    on one that is free.
    """
    return process is not None and process.user == os.geteuid()


def _metadata(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""
