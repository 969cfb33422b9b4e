"""Streams of bytes to a daemon, bare or within TLS, and what is written to them."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from tests.fuzz.daemons.inputs import Outcome, Violation

END_DEADLINE_S = 20.0
"""A daemon has to let go of a stream that has ended within this time."""
WAIT_S = 0.1
"""How long the fuzzer waits where a daemon may well wait for more."""
_READ_NBYTES = 65536
_MAX_KEPT_NBYTES = 2**20


class Ending(Enum):
    """How the fuzzer ends."""

    END = "end"
    """No more bytes; the daemon has to close."""
    RESET = "reset"
    WAIT = "wait"
    """Says nothing for a moment, then leaves."""


class Pipe:
    """A stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over_tcp(cls, port: int) -> Pipe:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    @classmethod
    async def over_unix(cls, path: str) -> Pipe:
        return cls(*await asyncio.open_unix_connection(path))

    async def write(self, data: bytes) -> None:
        """Raises OSError."""
        self._writer.write(data)
        await self._writer.drain()

    async def read(self) -> bytes:
        """What comes next; nothing at the end. Raises OSError."""
        return await self._reader.read(_READ_NBYTES)

    def end(self) -> None:
        """Send no more. Raises OSError."""
        self._writer.write_eof()

    def abort(self, *, reset: bool) -> None:
        """Leave at once, with an RST if ``reset`` and the stream can say so."""
        sock = self._writer.get_extra_info("socket")
        if reset and sock is not None and sock.family != socket.AF_UNIX:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class TlsPipe(Pipe):
    """TLS over a stream. What is written ``bare`` goes between its records, or in their place."""

    def __init__(self, bare: Pipe, context: ssl.SSLContext) -> None:
        super().__init__(bare._reader, bare._writer)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")

    async def shake_hands(self) -> None:
        """Raises OSError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._receive()
            else:
                await self._flush()
                return

    def encrypted(self, data: bytes) -> bytes:
        """As records, which count as sent."""
        self._tls.write(data)
        return self._outgoing.read()

    async def write(self, data: bytes) -> None:
        if data:
            await super().write(self.encrypted(data))

    async def write_bare(self, data: bytes) -> None:
        await super().write(data)

    async def read(self) -> bytes:
        while True:
            try:
                return self._tls.read(_READ_NBYTES)
            except ssl.SSLWantReadError:
                if not await self._receive():
                    return b""

    async def _flush(self) -> None:
        await super().write(self._outgoing.read())

    async def _receive(self) -> bytes:
        data = await super().read()
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return data


class Plan(NamedTuple):
    """Bytes to write, with a pause before each piece but the first."""

    pieces: tuple[bytes, ...]
    pause_s: float = 0.0
    ending: Ending = Ending.END


Classify = Callable[[bytes], Outcome]
"""From all that a daemon said to what that means."""


async def play(
    open_pipe: Callable[[], Awaitable[Pipe]],
    plan: Plan,
    classify: Classify,
    prepare: Callable[[Pipe], Awaitable[None]] | None = None,
) -> Outcome:
    """Write to a new stream and see how it ends. Raises Violation if it does not.

    ``prepare``: what is said, and heard, before.
    """
    try:
        pipe = await open_pipe()
    except ConnectionRefusedError as error:
        raise Violation("nobody listens any more") from error
    except OSError:
        return Outcome.CLOSED
    received = bytearray()
    reader = None
    try:
        if prepare is not None:
            await prepare(pipe)
        reader = asyncio.create_task(_read_on(pipe, received))
        is_waiting = await _write_all(pipe, plan, reader)
        if is_waiting:
            return Outcome.TIMED_OUT
    except OSError:
        pass  # closed while this end wrote: what was said before is still there
    finally:
        if reader is not None:
            if not reader.done():
                await asyncio.wait([reader], timeout=WAIT_S)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        pipe.abort(reset=plan.ending is Ending.RESET)
    return classify(bytes(received))


async def _write_all(pipe: Pipe, plan: Plan, reader: asyncio.Task[None]) -> bool:
    """Whether the daemon still waits for more at the end."""
    for number, piece in enumerate(plan.pieces):
        if number and plan.pause_s:
            await asyncio.sleep(plan.pause_s)
        if reader.done():
            return False
        async with asyncio.timeout(END_DEADLINE_S):
            await pipe.write(piece)
    if plan.ending is Ending.RESET:
        reader.cancel()
        return False
    if plan.ending is Ending.END:
        pipe.end()
    limit_s = END_DEADLINE_S if plan.ending is Ending.END else WAIT_S
    await asyncio.wait([reader], timeout=limit_s)
    if plan.ending is Ending.END and not reader.done():
        raise Violation(f"a stream that had ended was not closed in {END_DEADLINE_S:g} s")
    return not reader.done()


async def _read_on(pipe: Pipe, received: bytearray) -> None:
    with suppress(OSError):
        while data := await pipe.read():
            if len(received) < _MAX_KEPT_NBYTES:
                received += data
