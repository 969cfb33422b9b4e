"""How two processes agree on a ``shm://`` connection, over a Unix socket.

The socket is in Linux's abstract namespace, so no file is left behind, and it keeps message
boundaries. The client sends one message:

    magic "PLSM" | version u32 | descriptors (SCM_RIGHTS): memory and two eventfds, see Shared

and the listener answers with the same eight bytes, in its own version. If that is another than
the client's it then closes. Numbers are native, as both ends are on one machine. Afterwards
nothing is sent any more, and the end of the socket tells that the peer is gone.

Who is at the other end is asked of the kernel before anything is sent: both must run as the same
user. Names in the abstract namespace are free to take for everybody, so the client asks as well,
and root is no exception: it must not tell its secrets to whoever took the name first.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from typing import NamedTuple

from privatelora.errors import AuthError, ConfigError, ConnectError, RemoteProtocolError
from privatelora.transports.address import Address
from privatelora.transports.flow import wake
from privatelora.transports.shm_shared import Shared, close_all

VERSION = 1
_MAGIC = b"PLSM"
_HELLO = struct.Struct("=4sI")
_OWN_HELLO = _HELLO.pack(_MAGIC, VERSION)

_NAME_PREFIX = b"\0privatelora-shm/"
_MAX_NAME_NBYTES = 108 - len(_NAME_PREFIX)
_UCRED = struct.Struct("=iII")
_SOCKET_TYPE = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
_BACKLOG = 128
_NUM_FDS = len(Shared._fields)
_BUSY_RETRY_S = 0.01


class Process(NamedTuple):
    """The process at the other end of a Unix socket, from the kernel (SO_PEERCRED)."""

    pid: int
    uid: int

    @classmethod
    def behind(cls, sock: socket.socket) -> Process:
        """Who called connect() or listen() there."""
        found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _gid = _UCRED.unpack(found)
        return cls(pid, uid)

    @property
    def is_same_user(self) -> bool:
        """Whether it belongs to the user that this process runs as."""
        return self.uid == os.geteuid()


def open_listener(address: Address) -> socket.socket:
    """Take the name of ``address``. Raises ConfigError or ConnectError."""
    name = _socket_name(address)
    try:
        return _listen(name)
    except OSError as error:
        hint = "this system may lack Unix sockets in the abstract namespace; use tcp://"
        if error.errno == errno.EADDRINUSE:
            hint = "stop the program that listens there or choose another name"
        raise ConnectError(f"cannot listen on {address}: {reason(error)}; {hint}") from error


async def open_connection(address: Address) -> socket.socket:
    """Connect to the listener of that name, which must be of the same user.

    Raises ConfigError, ConnectError or AuthError.
    """
    name = _socket_name(address)
    try:
        sock = await _connect(name)
    except ConnectionRefusedError as error:
        raise ConnectError(
            f"cannot connect to {address}: nothing listens on this name; check that the peer is "
            "running on this machine, and in this container (network namespace); across these "
            "use tcp://"
        ) from error
    except OSError as error:
        raise ConnectError(
            f"cannot connect to {address}: {reason(error)}; use another name or tcp://"
        ) from error
    listener = Process.behind(sock)
    if not listener.is_same_user:
        sock.close()
        raise AuthError(
            f"cannot connect to {address}: user {listener.uid} listens there (process "
            f"{listener.pid}) and this is user {os.geteuid()}; run both ends as one user, or use "
            "tls://"
        )
    return sock


async def offer(sock: socket.socket, shared: Shared, address: Address) -> None:
    """The client's side: send the descriptors and wait for the answer. Raises ConnectError."""
    try:
        socket.send_fds(sock, [_OWN_HELLO], shared)
        await _readable(sock)
        answer = sock.recv(_HELLO.size + 1)
    except OSError as error:
        raise _turned_away(address, reason(error)) from error
    if not answer:
        raise _turned_away(address, "the listener closed the connection")
    version = _version(answer)
    if version is None:
        raise ConnectError(
            f"cannot connect to {address}: what listens there does not speak as PrivateLoRA does "
            f"({answer!r}); use another name"
        )
    if version != VERSION:
        raise ConnectError(
            f"cannot connect to {address}: the listener has version {version} of shm:// and this "
            f"end {VERSION}; install the same release on both ends, or use tcp://"
        )


async def receive_offer(sock: socket.socket, peer: str) -> Shared:
    """The listener's side: wait for the client's descriptors, check them and return them.

    Raises RemoteProtocolError, or OSError if the client has left.
    """
    await _readable(sock)
    hello, fds, flags, _ = socket.recv_fds(sock, _HELLO.size + 1, _NUM_FDS, socket.MSG_CMSG_CLOEXEC)
    try:
        if not hello:
            raise ConnectionResetError(errno.ECONNRESET, "it left before it said anything")
        _check_hello(sock, hello, peer)
        _check_number(fds, flags, peer)
        shared = Shared(*fds)
        shared.check(peer)
    except BaseException:
        close_all(fds)
        raise
    return shared


def accept_offer(sock: socket.socket) -> None:
    """The listener's side: let the client begin. Raises OSError if it has left."""
    sock.send(_OWN_HELLO)


def _listen(name: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, _SOCKET_TYPE)
    try:
        sock.bind(name)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect(name: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, _SOCKET_TYPE)
    try:
        # Too many wait to be accepted, and no event tells when there is room for one more.
        while (code := sock.connect_ex(name)) == errno.EAGAIN:  # noqa: ASYNC110
            await asyncio.sleep(_BUSY_RETRY_S)
        if code != 0:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def _check_hello(sock: socket.socket, hello: bytes, peer: str) -> None:
    version = _version(hello)
    if version is None:
        raise RemoteProtocolError(f"{peer} does not speak as PrivateLoRA does ({hello!r})")
    if version != VERSION:
        sock.send(_OWN_HELLO)
        raise RemoteProtocolError(
            f"{peer} has version {version} of shm:// and this end {VERSION}; install the same "
            "release on both ends"
        )


def _check_number(fds: list[int], flags: int, peer: str) -> None:
    if len(fds) == _NUM_FDS and not flags & socket.MSG_CTRUNC:
        return
    if flags & socket.MSG_CTRUNC and len(fds) < _NUM_FDS:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    found = "more" if flags & socket.MSG_CTRUNC else str(len(fds))
    raise RemoteProtocolError(f"{peer} sent {found} descriptors where {_NUM_FDS} are agreed")


def _version(hello: bytes) -> int | None:
    if len(hello) != _HELLO.size or not hello.startswith(_MAGIC):
        return None
    version: int = _HELLO.unpack(hello)[1]
    return version


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    loop.add_reader(sock.fileno(), wake, waiter)
    try:
        await waiter
    finally:
        loop.remove_reader(sock.fileno())


def _socket_name(address: Address) -> bytes:
    name = address.require_name().encode()
    if len(name) > _MAX_NAME_NBYTES:
        raise ConfigError(
            f"address {str(address)!r} is not usable: the name must have at most "
            f"{_MAX_NAME_NBYTES} characters"
        )
    return _NAME_PREFIX + name


def _turned_away(address: Address, reason: str) -> ConnectError:
    return ConnectError(f"cannot connect to {address}: {reason}; the listener's log says why")


def reason(error: OSError) -> str:
    """What the system says, for the middle of a sentence."""
    return (error.strerror or str(error)).lower()
