"""``shm://name``: frames over memory that two processes on one Linux machine share.

The fastest way between two processes of one user; nothing but a wake-up passes through the
kernel. A connection takes 2 MiB of shared memory (``shm_shared.MEMORY_NBYTES``), and four
descriptors at each end. ``name`` is any that no other program of the machine (in containers: of
the network namespace) has taken; it is free again when its listener has gone, however that ended.

Both ends must run as the same user. What the other process writes into the memory is checked
like what comes over a network.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from functools import partial

from privatelora.errors import ConfigError, ConnectError, RemoteProtocolError, TransportTimeout
from privatelora.transports.address import Address, parse_address
from privatelora.transports.base import (
    Connection,
    Credentials,
    Handler,
    Limits,
    Listener,
    Transport,
)
from privatelora.transports.brief_log import BriefLog
from privatelora.transports.handlers import HandlerTasks
from privatelora.transports.shm_handshake import (
    Process,
    accept_offer,
    offer,
    open_connection,
    open_listener,
    reason,
    receive_offer,
)
from privatelora.transports.shm_shared import MEMORY_NBYTES, Shared, close_all
from privatelora.transports.shm_stream import ShmStream
from privatelora.transports.sockets import AcceptLoop
from privatelora.transports.stream import StreamConnection

_logger = logging.getLogger("privatelora.transports")

DEFAULT_SPIN_S = 100e-6
"""How long ``recv`` looks for a frame before it sleeps, unless ``Limits.spin_s`` says otherwise.

Measured: a sleep makes a round trip of 6 us one of 30 to 60 us, and this much covers a peer that
takes 90 us to answer. Looking for longer would cost more than the sleep it avoids.
"""


class ShmListener(Listener):
    """Accepts connections on a socket that listens already, which it owns."""

    def __init__(self, address: str, sock: socket.socket, handler: Handler, limits: Limits) -> None:
        self._address = address
        self._limits = limits
        self._handlers = HandlerTasks(handler, address)
        self._handshakes: set[asyncio.Task[None]] = set()
        self._log = BriefLog(_logger)
        self._accept_loop = AcceptLoop([sock], self._accepted, address)

    @property
    def address(self) -> str:
        """Contact address."""
        return self._address

    async def aclose(self) -> None:
        """Stop accepting, cancel handshakes and handlers and wait for them."""
        self._accept_loop.close()
        for handshake in self._handshakes:
            handshake.cancel()
        if self._handshakes:
            await asyncio.wait(self._handshakes)
        await self._handlers.aclose()

    def _accepted(self, sock: socket.socket) -> None:
        process = Process.behind(sock)
        if not process.is_same_user:
            self._log.warning(
                "%s: refused process %d: it is of user %d, this is user %d",
                self._address,
                process.pid,
                process.uid,
                os.geteuid(),
            )
            sock.close()
            return
        peer = f"{self._address} (process {process.pid})"
        task = asyncio.get_running_loop().create_task(
            self._shake_hands(sock, peer), name=f"handshake with {peer}"
        )
        self._handshakes.add(task)
        task.add_done_callback(partial(self._handshake_done, sock))

    async def _shake_hands(self, sock: socket.socket, peer: str) -> None:
        timeout_s = self._limits.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                shared = await receive_offer(sock, peer)
            connection = _connection(sock, shared, self._limits, is_client=False, peer=peer)
            try:
                accept_offer(sock)
            except OSError:
                connection.abort()
                raise
        except TimeoutError:
            self._dropped(sock, f"{peer} said nothing for {timeout_s:g} s")
        except ConnectionError:
            _logger.info("%s: %s left during the handshake", self._address, peer)
            sock.close()
        except RemoteProtocolError as error:
            self._dropped(sock, str(error))
        except OSError as error:
            self._dropped(
                sock,
                f"what {peer} shares could not be taken: {reason(error)}; raise the limits of "
                "memory and open files here",
            )
        else:
            self._handlers.start(connection)

    def _dropped(self, sock: socket.socket, why: str) -> None:
        sock.close()
        self._log.warning("%s: dropped a client: %s", self._address, why)

    def _handshake_done(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        # Here and not in the task, which never runs if it is cancelled before its first step.
        if task.cancelled():
            sock.close()


class ShmTransport(Transport):
    """``shm://name``."""

    async def connect(self, address: str, limits: Limits, credentials: Credentials) -> Connection:
        """Connect to the listener of that name; see Transport.connect."""
        parsed = _parse(address, credentials)
        try:
            async with asyncio.timeout(limits.connect_timeout_s):
                sock = await open_connection(parsed)
                try:
                    return await _offer(sock, parsed, limits)
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError as error:
            raise TransportTimeout(
                f"cannot connect to {address}: no answer within {limits.connect_timeout_s:g} s; "
                "check that the listener is not stopped or overloaded"
            ) from error

    async def listen(
        self, address: str, handler: Handler, limits: Limits, credentials: Credentials
    ) -> Listener:
        """Take the name; see Transport.listen."""
        parsed = _parse(address, credentials)
        return ShmListener(address, open_listener(parsed), handler, limits)


def _parse(address: str, credentials: Credentials) -> Address:
    parsed = parse_address(address)
    parsed.require_options()
    credentials.require_only(address)
    if sys.platform != "linux" or not hasattr(os, "memfd_create") or sys.maxsize < 2**63 - 1:
        raise ConfigError(
            f"{address} needs 64-bit Linux with memfd_create; use tcp://127.0.0.1 with a port"
        )
    return parsed


async def _offer(sock: socket.socket, address: Address, limits: Limits) -> Connection:
    try:
        shared = Shared.create()
        try:
            await offer(sock, shared, address)
        except BaseException:
            close_all(shared)
            raise
        return _connection(sock, shared, limits, is_client=True, peer=str(address))
    except OSError as error:
        raise ConnectError(
            f"cannot connect to {address}: no sealed shared memory of {MEMORY_NBYTES} bytes "
            f"({reason(error)}); raise the limits of memory and open files, or use tcp://"
        ) from error


def _connection(
    sock: socket.socket, shared: Shared, limits: Limits, *, is_client: bool, peer: str
) -> StreamConnection:
    """Frames over what is given, which is taken over or closed. Raises OSError."""
    try:
        stream = ShmStream(sock, shared, is_client=is_client, peer=peer)
    except BaseException:
        close_all(shared)
        raise
    spin_s = DEFAULT_SPIN_S if limits.spin_s is None else limits.spin_s
    return StreamConnection(stream, limits, spin_s)
