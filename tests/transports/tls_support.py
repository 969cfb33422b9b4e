"""What the tests of TLS share."""

from __future__ import annotations

import pytest

from privatelora.transports.base import Credentials, Limits
from privatelora.transports.framing import HEADER, MAGIC
from privatelora.transports.registry import connect
from tests.transports.support import received, settled
from tests.transports.tls_keyrings import tls

ANYWHERE = "tls://127.0.0.1:0"
CLOUD, EDGE = tls("cloud"), tls("edge", trust="cloud")
CLOUD_WITH_CLIENTS = tls("cloud", trust="edge")


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def round_trip(address: str, credentials: Credentials) -> None:
    async with await connect(address, Limits(), credentials) as connection:
        await connection.send(b"hello")
        assert await received(connection) == b"hello"


async def logged(log: pytest.LogCaptureFixture, *words: str) -> None:
    """Wait for a warning of the listener that has all ``words``, and for nothing worse."""

    def found() -> bool:
        return any(all(word in message for word in words) for message in log.messages)

    await settled(found)
    assert {(record.name, record.levelname) for record in log.records} == {
        ("privatelora.transports", "WARNING")
    }


def framed(payload: bytes) -> bytes:
    return HEADER.pack(MAGIC, len(payload)) + payload
