"""Peers that are not what they should be, on the cloud's port and in the cloud's place."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial

from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.wire.codec import encode
from privatelora.runtime.wire.messages import ErrorCode, Fingerprints, Hello, Role
from tests.e2e.bad_input_bench import TRANSPORT_HEADER, Bench, Cases, Seen
from tests.e2e.processes import PATIENCE_S

CASES = Cases()


def frame(payload: bytes) -> bytes:
    """As TCP carries it."""
    return TRANSPORT_HEADER.pack(b"PLR1", len(payload)) + payload


def hello(role: Role, version: int | None = None) -> bytes:
    """A frame with the first message of a peer, which may speak another version."""
    message = Hello(role, "test", Fingerprints("a" * 64, "b" * 64, "c" * 64), CODEC_NAMES, 2**20)
    payload = bytearray(b"".join(encode(message)))
    if version is not None:
        struct.pack_into("<H", payload, 2, version)
    return frame(bytes(payload))


HTTP_REQUEST = b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"
HTTP_REPLY = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
TOO_LARGE = TRANSPORT_HEADER.pack(b"PLR1", 2**32 - 1)
ANOTHER_VERSION = "the peer speaks protocol version 2, this end version 1"

_sent: bytes
_reply: ErrorCode | None
for _name, _sent, _printed, _reply in (
    ("HTTP request to the cloud", HTTP_REQUEST, "does not send PrivateLoRA frames", None),
    ("random bytes to the cloud", bytes(range(7, 77)), "does not send PrivateLoRA frames", None),
    ("frame larger than the cloud's limit", TOO_LARGE, "over this end's limit of 1048576", None),
    ("edge of another version", hello(Role.EDGE, 2), ANOTHER_VERSION, ErrorCode.VERSION),
    ("cloud in an edge's place", hello(Role.CLOUD), "one end must be each", ErrorCode.PROTOCOL),
    (
        "frame that is no message",
        frame(b"\xff" * 100),
        "does not end with its checksum",
        ErrorCode.PROTOCOL,
    ),
    ("empty frame", frame(b""), "a frame of 0 bytes is too short", ErrorCode.PROTOCOL),
):
    CASES.add(_name, _printed, partial(Bench.peer_of_cloud, sent=_sent, reply=_reply))


@contextlib.contextmanager
def impostor(*replies: bytes) -> Iterator[str]:
    """The address of something that is no cloud: it answers whatever comes first and closes."""

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            connection.recv(65536)
            for reply in replies:
                connection.sendall(reply)
            with contextlib.suppress(OSError):  # the edge may have left
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        finally:
            thread.join()


def _meets(bench: Bench, *, replies: tuple[bytes, ...]) -> Seen:
    with impostor(*replies) as address:
        return bench.edge_at(address)


CASES.add(
    "cloud of another version", ANOTHER_VERSION, partial(_meets, replies=(hello(Role.CLOUD, 2),))
)
CASES.add(
    "HTTP server instead of a cloud",
    "does not send PrivateLoRA frames (found b'HTTP/1.1 400 Bad'",
    partial(_meets, replies=(HTTP_REPLY,)),
)
CASES.add(
    "frame larger than the edge's limit",
    "over this end's limit of",
    partial(_meets, replies=(TOO_LARGE,)),
)
CASES.add(
    "peer that closes at once",
    "closed the connection without a greeting",
    partial(_meets, replies=()),
)


@CASES.case("peer that says nothing", "said nothing for 0.2 s; is it a PrivateLoRA cloud?")
def _silent(bench: Bench) -> Seen:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        return bench.edge_at(address, connect_timeout_s=0.2)
