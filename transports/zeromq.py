"""``zmq+tcp://host:port`` and ``zmq+ipc://name``: frames in ZeroMQ messages.

On top of ZeroMQ's messages there is a small protocol for connections (zeromq_protocol.py). With
CURVE keys both ends prove what they are and everything is encrypted. Without, ``zmq+tcp`` serves
everybody who can reach the port, and ``zmq+ipc`` processes of the same user.
"""

from __future__ import annotations

import asyncio
import socket

from privatelora.errors import ConnectError, TransportTimeout
from privatelora.transports.address import Address, parse_address
from privatelora.transports.base import (
    Connection,
    Credentials,
    Handler,
    Limits,
    Listener,
    Transport,
)
from privatelora.transports.sockets import Endpoint, contact_text, dial, open_listeners
from privatelora.transports.zeromq_client import open_connection
from privatelora.transports.zeromq_connection import ZmqConnection
from privatelora.transports.zeromq_curve import ClientKeys, ListenerKeys
from privatelora.transports.zeromq_endpoints import ipc_sockaddr, open_ipc_listener
from privatelora.transports.zeromq_listener import ZmqListener


class ZmqTransport(Transport):
    """``zmq+tcp://host:port`` and ``zmq+ipc://name``."""

    async def connect(self, address: str, limits: Limits, credentials: Credentials) -> Connection:
        """Connect; see Transport.connect."""
        parsed = _parse(address, credentials)
        keys = ClientKeys.read(credentials.curve) if credentials.curve is not None else None

        async def connect(endpoint: Endpoint) -> ZmqConnection:
            return await open_connection(address, endpoint, limits, keys)

        if not _is_ipc(parsed):
            return await dial(parsed, limits.connect_timeout_s, connect)
        sockaddr = ipc_sockaddr(parsed)
        try:
            async with asyncio.timeout(limits.connect_timeout_s):
                return await connect((socket.AF_UNIX, sockaddr))
        except TimeoutError as error:
            raise TransportTimeout(
                f"cannot connect to {address}: no answer within {limits.connect_timeout_s:g} s; "
                "check that the peer is not stuck"
            ) from error
        except OSError as error:
            raise ConnectError(
                f"cannot connect to {address}: nothing listens on this name; check that the peer "
                "is running on this machine, and in this container (network namespace)"
            ) from error

    async def listen(
        self, address: str, handler: Handler, limits: Limits, credentials: Credentials
    ) -> Listener:
        """Listen; see Transport.listen."""
        parsed = _parse(address, credentials)
        keys = ListenerKeys.read(credentials.curve) if credentials.curve is not None else None
        if _is_ipc(parsed):
            sockets = [open_ipc_listener(parsed)]
        else:
            sockets = await open_listeners(parsed)
            parsed = parse_address(contact_text(parsed, sockets[0]))
        return ZmqListener(parsed, sockets, handler, limits, keys)


def _parse(address: str, credentials: Credentials) -> Address:
    parsed = parse_address(address)
    parsed.require_options()
    credentials.require_only(address, "curve")
    return parsed


def _is_ipc(address: Address) -> bool:
    return address.scheme == "zmq+ipc"
