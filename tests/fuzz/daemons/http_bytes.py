"""Requests that are no good HTTP, and what an HTTP server said."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from random import Random

from tests.fuzz.daemons.inputs import Input, Outcome, Violation
from tests.fuzz.daemons.pipes import Ending, Pipe, Plan, play
from tests.fuzz.daemons.streams import foreign
from tests.fuzz.mutations import below, pick

_LINES = (
    *(b"GET / HTTP/1.1", b"GET / HTTP/1.0", b"GET /", b"GET  / HTTP/1.1", b"get / HTTP/1.1"),
    *(b"GET / HTTP/9.9", b"GET / HTTP/1.1 x", b"GET /\x00 HTTP/1.1", b"GET /\xff\xfe HTTP/1.1"),
    *(b"GET http://a/ HTTP/1.1", b"GET * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT a:1 HTTP/1.1"),
    *(b"HEAD /metrics HTTP/1.1", b"TRACE / HTTP/1.1", b"PUT /v1/models HTTP/1.1", b"", b" ", b"/"),
    *(b"GET /%00%ff%zz HTTP/1.1", b"GET /" + b"a" * 70000 + b" HTTP/1.1", b"GET ? HTTP/1.1"),
    *(b"X" * 300 + b" / HTTP/1.1", b"GET //../../etc/passwd HTTP/1.1", b"GET /?\r\n HTTP/1.1"),
    *(b"GET //[ HTTP/1.1", b"GET http://[::1 HTTP/1.1", b"GET /#x HTTP/1.1", b"PRI * HTTP/2.0"),
)
_HEADERS = (
    *(
        b"Host:",
        b"Host: [",
        b"Host: a, b",
        b"Host: localhost\r\nHost: evil",
        b": x",
        b"X",
        b"X Y: z",
    ),
    *(b"X: \x00", b"X: \xff", b"X:\r\n folded", b"X: " + b"y" * 40000, b"\x80: x", b"X: \r"),
    *(b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999"),
    *(b"Content-Length: 1\r\nContent-Length: 2", b"Content-Length: 0x10", b"Content-Length: 1, 1"),
    *(b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Content-Length: +3"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Transfer-Encoding: x, chunked"),
    *(b"Expect: 100-continue", b"Expect: 200-ok", b"Upgrade: websocket\r\nConnection: Upgrade"),
    *(b"Connection: keep-alive, close", b"Content-Encoding: gzip", b"Content-Type: \xff"),
    *(
        b"Origin: http://evil",
        b"Origin: null",
        b"Authorization: Bearer \xff",
        b"Accept-Encoding: x",
    ),
    *(b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",),
)
_CHUNKS = (
    *(
        b"0\r\n\r\n",
        b"2\r\n{}\r\n0\r\n\r\n",
        b"2;x=y\r\n{}\r\n0\r\nT: v\r\n\r\n",
        b"FFFFFFFFFFFFFFFFF\r\n",
    ),
    *(b"7fffffff\r\nx", b"-1\r\nx\r\n", b"zz\r\n", b"2\r\n{}x\r\n", b"2\n{}\n0\n\n", b"0\r\nX: y"),
    *(
        b"1\r\n{\r\n" * 300 + b"0\r\n\r\n",
        b"\r\n\r\n",
        b"2" + b"0" * 50 + b"\r\n",
        b"0x2\r\n{}\r\n",
    ),
    *(b"2;" + b"x" * 20000 + b"\r\n{}\r\n0\r\n\r\n", b"0\r\n" + b"T: v\r\n" * 3000 + b"\r\n"),
)
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")

_KINDS = (
    *("request line", "header", "header", "length lied about", "chunks", "pipelined", "cut off"),
    *("bytes spoilt", "bytes spoilt", "large header", "many headers", "foreign", "left early"),
    "bytes one by one",
)


class HttpBytes:
    """Makes inputs of bytes from good requests, each with a body or none."""

    def __init__(self, open_pipe: Callable[[], Awaitable[Pipe]], requests: Sequence[bytes]) -> None:
        self._open_pipe = open_pipe
        self._requests = requests

    def make(self, rng: Random) -> Input:
        kind = pick(rng, _KINDS)
        good = pick(rng, self._requests)
        head, _, body = good.partition(b"\r\n\r\n")
        line, _, headers = head.partition(b"\r\n")
        pieces, pause_s = [good], 0.0
        ending = pick(rng, (Ending.END, Ending.END, Ending.END, Ending.RESET, Ending.WAIT))
        if kind == "request line":
            pieces = [b"\r\n".join((pick(rng, _LINES), headers, b"", body))]
        elif kind == "header":
            odd = [pick(rng, _HEADERS) for _ in range(1 + below(rng, 3))]
            pieces = [b"\r\n".join((line, *odd, headers, b"", body))]
        elif kind == "length lied about":
            length = pick(rng, (0, 1, len(body) - 1, len(body) + 1, 2**22, 2**22 + 1, 2**40))
            headers = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % length, headers)
            pieces = [b"\r\n".join((line, headers, b"", body))]
        elif kind == "chunks":
            headers = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", headers)
            pieces = [b"\r\n".join((line, headers, b"", b"")), pick(rng, _CHUNKS)]
        elif kind == "pipelined":
            good = good.replace(b"Connection: close\r\n", b"")
            pieces = [b"".join([good, *(pick(rng, self._requests) for _ in range(below(rng, 20)))])]
        elif kind == "cut off":
            pieces = [good[: below(rng, len(good))]]
        elif kind == "bytes spoilt":
            spoilt = bytearray(good)
            for _ in range(1 + below(rng, 5)):
                spoilt[below(rng, len(spoilt))] = pick(rng, (0, 10, 13, 32, 58, 127, 255))
            pieces = [bytes(spoilt)]
        elif kind == "large header":
            value = b"x" * pick(rng, (1000, 33_000, 70_000, 300_000))
            pieces = [b"\r\n".join((line, b"X: " + value, headers, b"", body))]
        elif kind == "many headers":
            many = [b"X%d: y" % i for i in range(pick(rng, (90, 101, 300, 3000)))]
            pieces = [b"\r\n".join((line, *many, headers, b"", body))]
        elif kind == "foreign":
            kind, data = foreign(rng)
            pieces = [data]
        elif kind == "left early":
            ending = Ending.RESET
        else:
            start = below(rng, len(good))
            pieces = [good[:start], *(good[i : i + 1] for i in range(start, start + 20))]
            pause_s = 0.002
        plan = Plan(tuple(pieces), pause_s, ending)
        return Input(f"bytes: {kind}", partial(play, self._open_pipe, plan, classify))


def classify(received: bytes) -> Outcome:
    """By the status of the first response. Raises Violation for a defect."""
    found = _STATUS.match(received)
    if found is None:
        return Outcome.ANSWERED if received else Outcome.CLOSED  # HTTP/0.9 has no status
    return classify_status(int(found[1]), received)


def classify_status(status: int, text: bytes) -> Outcome:
    """What a response with this status and text means. Raises Violation for a defect."""
    if status == 500:
        raise Violation(f"a request led to {text[:600]!r}")
    if status == 0:
        return Outcome.CLOSED
    return Outcome.ANSWERED if status < 400 else Outcome.REFUSED


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """A good request, after which the server closes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body
