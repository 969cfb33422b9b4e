"""A raw Unix socket where shm:// expects PrivateLoRA."""

from __future__ import annotations

import asyncio
import contextlib
import socket

HELLO = b"PLSM\x01\0\0\0"


def socket_name(address: str) -> bytes:
    return b"\0privatelora-shm/" + address.partition("//")[2].encode()


def raw_client(address: str) -> socket.socket:
    """A plain blocking socket, connected to a listener."""
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    raw.settimeout(10)
    raw.connect(socket_name(address))
    return raw


async def last_words(raw: socket.socket) -> list[bytes]:
    """What the other end says before it closes."""
    messages = []
    with contextlib.suppress(ConnectionResetError):
        while message := await asyncio.to_thread(raw.recv, 100):
            messages.append(message)
    return messages
