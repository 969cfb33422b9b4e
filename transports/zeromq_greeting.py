"""Asks a ZeroMQ peer what security it uses, by reading its greeting (ZMTP 3.1 section 3.1).

ZeroMQ itself often cannot say why a handshake failed: the peer may close before its greeting
was read.
"""

from __future__ import annotations

import asyncio
import socket

from privatelora.transports.sockets import Endpoint

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_VERSION = 3
# The peer then sends its whole greeting, and waits for the rest of ours.
_REQUEST = _SIGNATURE + bytes([_VERSION])
_GREETING_NBYTES = 64
_MECHANISM = slice(12, 32)


async def offered_mechanism(endpoint: Endpoint) -> str | None:
    """``NULL``, ``CURVE``, ...; None if what answers at a plain socket's address is no ZeroMQ.

    Raises OSError if nothing answers there any more.
    """
    family, sockaddr = endpoint
    loop = asyncio.get_running_loop()
    greeting = b""
    with socket.socket(family) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, sockaddr)
        try:
            await loop.sock_sendall(sock, _REQUEST)
            while len(greeting) < _GREETING_NBYTES:
                more = await loop.sock_recv(sock, _GREETING_NBYTES - len(greeting))
                if not more:
                    return None
                greeting += more
        except OSError:
            return None
    if greeting[0] != _SIGNATURE[0] or greeting[9] != _SIGNATURE[9] or greeting[10] < _VERSION:
        return None
    return greeting[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
