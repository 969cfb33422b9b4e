"""A client that asks over HTTP and waits for its answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple

from tests.fuzz.daemons.http_bytes import request
from tests.fuzz.daemons.inputs import Violation
from tests.fuzz.daemons.pipes import Pipe
from tests.fuzz.daemons.world import DEADLINE_S, NUM_TOKENS, PROMPT

QUESTION = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True}
_RETRY_S = 0.05


class Response(NamedTuple):
    """``status`` is 0 if the connection was lost before any came."""

    status: int
    body: bytes


async def fetch(port: int, data: bytes) -> Response:
    """Send a request that asks to close, and read to the end. Raises OSError."""
    pipe = await Pipe.over_tcp(port)
    received = b""
    try:
        await pipe.write(data)
        while more := await pipe.read():
            received += more
    except ConnectionError:  # refused before it was read to its end; the answer may be there
        pass
    finally:
        pipe.abort(reset=False)
    head, _, body = received.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return Response(int(words[1]) if len(words) > 1 else 0, body)


def completion(values: dict[str, Any]) -> bytes:
    """A request for one."""
    return request("POST", "/v1/completions", json.dumps(values).encode())


async def good_answer(port: int) -> str:
    """The text of an answer, tried again while the server cannot. Raises Violation."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                status, body = await fetch(port, completion(QUESTION))
                if status == 200:
                    return str(json.loads(body)["choices"][0]["text"])
                if (status < 429 and status != 0) or status == 500:
                    raise Violation(f"a good client was answered {status}: {body[:600]!r}")
                await asyncio.sleep(_RETRY_S)
    except TimeoutError as error:
        raise Violation(f"a good client had no answer in {DEADLINE_S:g} s") from error
    except OSError as error:
        raise Violation(f"a good client could not connect: {error}") from error
