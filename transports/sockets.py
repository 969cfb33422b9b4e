"""Opening, listening on and accepting raw non-blocking TCP sockets.

Everything waits through ``loop.add_reader`` and ``loop.add_writer`` with bare descriptors,
which asyncio and uvloop treat alike as long as a descriptor is removed before it is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import monotonic, thread_time
from typing import Any, TypeVar

from privatelora.errors import ConnectError, TransportTimeout
from privatelora.transports.address import Address
from privatelora.transports.flow import wake

_logger = logging.getLogger("privatelora.transports")

ACCEPT_RETRY_S = 1.0
"""Pause after a failed accept (no descriptors left, say); retrying at once would spin."""
NUM_SPARE_DESCRIPTORS = 32
"""Left for what else this process opens: a connection that would take one of them is closed."""

_BACKLOG = 512
_MAX_ACCEPTS = 4
"""At once, before others on the event loop have their turn."""
_REST = 40
"""Accepting rests this many times as long as it took, because what follows takes time as well."""
_REST_SPARED_S = 1.0
"""Rest that is saved up while nobody comes, so that a few hundred peers may come at once."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# Without these the system looks after a silent peer only after two hours.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

Endpoint = tuple[socket.AddressFamily, Any]
"""Family, and what bind and connect take."""
_Connected = TypeVar("_Connected")


async def wait_writable(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, waiter: asyncio.Future[None]
) -> None:
    """Wait until ``sock`` takes bytes or has failed, or ``waiter`` is resolved otherwise."""
    loop.add_writer(sock.fileno(), wake, waiter)
    try:
        await waiter
    finally:
        # Once it is closed its number may already be another socket's.
        if sock.fileno() != -1:
            loop.remove_writer(sock.fileno())


def configure(sock: socket.socket) -> None:
    """Set what every connected socket has: non-blocking, and with TCP no delay and keep-alive."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def close_with_reset(sock: socket.socket) -> None:
    """Close without delivering what is unsent; the peer sees a reset."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    sock.close()


def endpoint_text(scheme: str, sockname: Sequence[Any]) -> str:
    """``scheme://host:port`` of what ``getsockname`` or ``getpeername`` returned."""
    return str(Address(scheme, sockname[0], sockname[1]))


def contact_text(address: Address, listening: socket.socket) -> str:
    """Contact address of a listener; for a wildcard, the one that works on this machine."""
    host = address.host
    if address.is_wildcard:
        host = "::1" if ":" in host else "127.0.0.1"
    return str(Address(address.scheme, host, listening.getsockname()[1]))


async def open_connection(address: Address, timeout_s: float) -> socket.socket:
    """Connect to a contact address; every IP of the host is tried in turn.

    Raises ConfigError, ConnectError or TransportTimeout.
    """
    return await dial(address, timeout_s, partial(_connect, asyncio.get_running_loop()))


async def dial(
    address: Address, timeout_s: float, connect: Callable[[Endpoint], Awaitable[_Connected]]
) -> _Connected:
    """Call ``connect`` for every IP of a contact address's host until one raises no OSError.

    Raises what ``connect`` does, but of OSErrors makes ConnectError and TransportTimeout;
    ConfigError.
    """
    host, port = address.require_contact()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    error: OSError | None = None
    try:
        async with asyncio.timeout_at(deadline):
            endpoints = await _resolve(address, host, port)
            for index, endpoint in enumerate(endpoints):
                # A dead first address must leave time for the others.
                share_s = (deadline - loop.time()) / (len(endpoints) - index)
                try:
                    async with asyncio.timeout(share_s):
                        return await connect(endpoint)
                except OSError as failure:
                    # A refusal says more than the silence of another address.
                    if error is None or isinstance(error, TimeoutError):
                        error = failure
    except TimeoutError as failure:
        error = error or failure
    if isinstance(error, TimeoutError):
        raise TransportTimeout(
            f"cannot connect to {address}: no answer within {timeout_s:g} s; "
            "check the host, the port and any firewall between"
        ) from error
    hint = "check the host and port"
    if isinstance(error, ConnectionRefusedError):
        hint = "check that the peer is running and listens on this host and port"
    raise ConnectError(f"cannot connect to {address}: {_reason(error)}; {hint}") from error


async def open_listeners(address: Address) -> list[socket.socket]:
    """Listen on every IP that the host of a listen address stands for, on one port.

    Raises ConfigError or ConnectError.
    """
    host, port = address.require_listen()
    sockets: list[socket.socket] = []
    error: OSError | None = None
    if host == "*":
        candidates: list[Endpoint] = [(socket.AF_INET6, ("::", port))]
        if not socket.has_dualstack_ipv6():
            candidates = [(socket.AF_INET, ("0.0.0.0", port))]
    else:
        candidates = await _resolve(address, host, port)
    for family, sockaddr in candidates:
        if sockets:
            sockaddr = (sockaddr[0], sockets[0].getsockname()[1], *sockaddr[2:])
        try:
            sockets.append(_listen((family, sockaddr), dual_stack=host == "*"))
        except OSError as failure:
            error = failure
            # A name such as localhost may stand for an IPv6 address that is switched off here.
            if failure.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    else:
        if sockets:
            return sockets
    for sock in sockets:
        sock.close()
    raise _cannot_listen(address, error) from error


class AcceptLoop:
    """Accepts on listening sockets, which it owns, and hands over configured sockets.

    ``on_accept`` must not wait; an OSError from it means that the peer is already gone.
    ``address``: the listener's, for the log; None for what a TCP socket itself says.

    New connections take a bounded share of the time, however many come: those who are connected
    have their work done first. The others wait in the system's queue, and, once that is full, are
    dropped by the system, which takes far less time than this process would. Those that have left
    by then without a word are not handed over.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        on_accept: Callable[[socket.socket], None],
        address: str | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_accept = on_accept
        self._address = address
        self._sockets = tuple(sockets)
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}
        self._rests_until = 0.0
        self._is_short = False
        for sock in self._sockets:
            self._resume(sock)

    def close(self) -> None:
        """Stop accepting and close the listening sockets. May be repeated."""
        for retry in self._retries.values():
            retry.cancel()
        for sock in self._sockets:
            if sock.fileno() != -1:
                self._loop.remove_reader(sock.fileno())
                sock.close()

    def charge(self, seconds: float) -> None:
        """Count processor time that was spent on a new connection after it was handed over."""
        self._rests_until = max(self._rests_until, monotonic() - _REST_SPARED_S) + _REST * seconds

    def _resume(self, listening: socket.socket) -> None:
        self._retries.pop(listening, None)
        self._loop.add_reader(listening.fileno(), self._accept, listening)

    def _pause(self, listening: socket.socket, seconds: float) -> None:
        self._loop.remove_reader(listening.fileno())
        self._retries[listening] = self._loop.call_later(seconds, self._resume, listening)

    def _accept(self, listening: socket.socket) -> None:
        started = thread_time()  # waiting for a processor is no work
        for _ in range(_MAX_ACCEPTS):
            try:
                sock, _peer = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            except OSError as error:
                self._note_shortage(listening, _reason(error))
                self._pause(listening, ACCEPT_RETRY_S)
                return
            if sock.fileno() >= _max_descriptor():
                sock.close()
                self._note_shortage(listening, "too many open files")
                continue
            self._is_short = False
            if sock.family != socket.AF_UNIX and _has_left(sock):
                sock.close()
                continue
            try:
                configure(sock)
                self._on_accept(sock)
            except OSError:
                sock.close()
        self.charge(thread_time() - started)
        now = monotonic()
        if self._rests_until > now:
            self._pause(listening, self._rests_until - now)

    def _note_shortage(self, listening: socket.socket, reason: str) -> None:
        if not self._is_short:
            self._is_short = True
            _logger.error(
                "%s cannot accept: %s; going on as soon as that is over",
                self._address or endpoint_text("tcp", listening.getsockname()),
                reason,
            )


def _has_left(sock: socket.socket) -> bool:
    """Whether a peer has said nothing and left: a look is far cheaper than a handler."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _max_descriptor() -> float:
    """The first descriptor that no connection may take."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return float("inf")
    return limit - min(NUM_SPARE_DESCRIPTORS, limit // 4)


async def _resolve(address: Address, host: str, port: int) -> list[Endpoint]:
    try:
        try:
            # Numbers need no name service, and so no thread.
            infos = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
        except socket.gaierror:
            infos = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
    except (OSError, UnicodeError) as error:
        raise ConnectError(
            f"cannot resolve the host of {address}: {_reason(error)}; "
            "check its spelling and this machine's name service"
        ) from error
    return [(family, sockaddr) for family, _type, _proto, _canonical, sockaddr in infos]


async def _connect(loop: asyncio.AbstractEventLoop, endpoint: Endpoint) -> socket.socket:
    family, sockaddr = endpoint
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        configure(sock)
        code = sock.connect_ex(sockaddr)
        if code == errno.EINPROGRESS:
            await wait_writable(loop, sock, loop.create_future())
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        # Dialling a free local port can meet itself, if the system picks it as the source.
        if code == 0 and sock.getsockname() == sock.getpeername():
            code = errno.ECONNREFUSED
        if code != 0:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def _listen(endpoint: Endpoint, *, dual_stack: bool) -> socket.socket:
    family, sockaddr = endpoint
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        sock.bind(sockaddr)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _cannot_listen(address: Address, error: OSError | None) -> ConnectError:
    hint = "check the host and port"
    if error is not None and error.errno == errno.EADDRINUSE:
        hint = "stop the program that listens there, choose another port, or 0 for any free one"
    elif error is not None and error.errno == errno.EADDRNOTAVAIL:
        hint = "name an address of this machine, or 0.0.0.0 for all of them"
    elif error is not None and error.errno in (errno.EACCES, errno.EPERM):
        hint = "choose a port above 1023 or run with the right to use it"
    return ConnectError(f"cannot listen on {address}: {_reason(error)}; {hint}")


def _reason(error: BaseException | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error)
