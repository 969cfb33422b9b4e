"""The attacks of ``privatelora-bench load``, on any address.

All connections come from many addresses of the loopback network, so that a listener sees many
machines. Those that are held and that the listener drops are opened again.

    dropped      opened and closed at once
    abandoned    the same with a TLS handshake begun (``tls://``)
    idle         opened and held; every second one says Hello first
    slow         a byte at a time: every second one its first words, the others, after a Hello, a
                 frame that they have declared as long as the cloud allows
    unread       says Hello and asks on and on without reading an answer
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from privatelora.runtime.wire.codec import encode
from privatelora.runtime.wire.messages import Ping
from privatelora.transports.address import parse_address
from privatelora.transports.framing import HEADER, MAGIC

TICK_S = 0.1
"""A slow writer writes a byte in this time."""
TICKS_PER_PING = 5
"""One that does not read asks once in so many."""

_PACE_S = 0.01
_MAX_OPENED_PER_TICK = 20
_CONNECT_TIMEOUT_S = 5.0
_SMALL_BUFFER_NBYTES = 4096
_FIRST_SOURCE, _NUM_SOURCES = 0x7F000101, 4000
"""127.0.1.1 and on."""
_IP_BIND_ADDRESS_NO_PORT = 24
"""Linux; not in the socket module of Python 3.11. Else every bind takes a port of its own."""


@dataclass
class Counts:
    """What an attack has come to. ``refused``: attempts that no connection came of."""

    opened: int = 0
    refused: int = 0
    dropped_by_listener: int = 0


@dataclass(frozen=True)
class Weapons:
    """What attacks consist of. ``hello``: a whole frame; ``max_frame_nbytes``: the cloud's.

    ``rate``: connections per second that are dropped or abandoned; ``num_idle``, ``num_slow``:
    those that are held, of each kind. ``context``: for ``tls://``.
    """

    hello: bytes
    max_frame_nbytes: int
    rate: float
    num_idle: int
    num_slow: int
    context: ssl.SSLContext | None


class Attack:
    """An attack on one address, which ends with ``aclose``."""

    def __init__(self, address: str, kinds: list[str], weapons: Weapons) -> None:
        self.counts = Counts()
        self._target = parse_address(address).require_contact()
        self._weapons = weapons
        self._sources = itertools.cycle(range(_NUM_SOURCES))
        self._held: set[_Held] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._passing = [kind for kind in ("dropped", "abandoned") if kind in kinds]
        makers: dict[str, tuple[int, Callable[[int], _Held]]] = {
            "idle": (weapons.num_idle, self._idle),
            "slow": (weapons.num_slow, self._slow),
            "unread": (weapons.num_slow, self._unread),
        }
        self._to_open = deque(
            (make, index)
            for kind, (number, make) in makers.items()
            if kind in kinds
            for index in range(number)
        )
        """What a connection is made by, for each that is missing."""

    async def begin(self) -> None:
        """Open what is to be held, each at least tried once, and start the rest."""
        for _ in range(0, len(self._to_open), _MAX_OPENED_PER_TICK):
            await self._open_missing()
        self._tasks.append(asyncio.create_task(self._hold()))
        for kind in self._passing:
            first_words = client_hello() if kind == "abandoned" else b""
            self._tasks.append(asyncio.create_task(self._come_and_go(first_words)))

    async def aclose(self) -> None:
        """Stop, and close everything. Raises what ended the attack before."""
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        for held in list(self._held):
            held.leave()

    def lost(self, held: _Held) -> None:
        """The listener has dropped a connection."""
        self._held.discard(held)
        self._to_open.append(held.origin)
        self.counts.dropped_by_listener += 1

    async def _come_and_go(self, first_words: bytes) -> None:
        started, num_done, counts = time.monotonic(), 0, self.counts
        while True:
            await asyncio.sleep(_PACE_S)
            num_due = int((time.monotonic() - started) * self._weapons.rate)
            for _ in range(num_due - num_done):
                with self._socket() as sock:
                    sock.connect_ex(self._target)
                    try:
                        # On the loopback interface it is there by now, or will not be soon.
                        sock.getpeername()
                        sock.send(first_words)
                        counts.opened += 1
                    except OSError:
                        counts.refused += 1
            num_done = num_due

    async def _hold(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for held in list(self._held):
                held.tick()
            await self._open_missing()

    async def _open_missing(self) -> None:
        missing = [
            self._to_open.popleft() for _ in range(min(len(self._to_open), _MAX_OPENED_PER_TICK))
        ]
        await asyncio.gather(*(self._open(make, index) for make, index in missing))

    async def _open(self, make: Callable[[int], _Held], index: int) -> None:
        held = make(index)
        sock = self._socket()
        if held.nonces is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER_NBYTES)
        context = self._weapons.context if held.is_encrypted else None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await loop.sock_connect(sock, self._target)
                await loop.create_connection(
                    lambda: held,
                    sock=sock,
                    ssl=context,
                    server_hostname=self._target[0] if context else None,
                )
        except OSError:
            sock.close()
            self.counts.refused += 1
            self._to_open.append((make, index))
        else:
            self.counts.opened += 1
            self._held.add(held)

    def _socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        source = _FIRST_SOURCE + next(self._sources)
        sock.bind((socket.inet_ntoa(source.to_bytes(4, "big")), 0))
        return sock

    def _idle(self, index: int) -> _Held:
        if index % 2:
            return _Held(self, (self._idle, index), is_encrypted=False)
        return _Held(self, (self._idle, index), first_words=self._weapons.hello)

    def _slow(self, index: int) -> _Held:
        origin, hello = (self._slow, index), self._weapons.hello
        if index % 2:
            words = hello if self._weapons.context is None else client_hello()
            return _Held(self, origin, slowly=words, is_encrypted=False)
        declared = HEADER.pack(MAGIC, self._weapons.max_frame_nbytes)
        return _Held(self, origin, first_words=hello + declared, slowly=itertools.repeat(0))

    def _unread(self, index: int) -> _Held:
        origin = self._unread, index
        return _Held(self, origin, first_words=self._weapons.hello, nonces=itertools.count())


class _Held(asyncio.Protocol):
    """A connection that is held. ``origin``: what it was made by.

    ``slowly``: bytes to write, one a tick. ``nonces``: of pings whose answers are not read, one
    a tick, of which every ``TICKS_PER_PING``-th is sent.
    """

    def __init__(
        self,
        attack: Attack,
        origin: tuple[Callable[[int], _Held], int],
        *,
        first_words: bytes = b"",
        slowly: Iterable[int] = (),
        nonces: Iterator[int] | None = None,
        is_encrypted: bool = True,
    ) -> None:
        self.origin = origin
        self.nonces = nonces
        self.is_encrypted = is_encrypted
        self._attack = attack
        self._first_words = first_words
        self._slowly = iter(slowly)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._first_words)
        if self.nonces is not None:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._transport = None
            self._attack.lost(self)

    def tick(self) -> None:
        """Do what is done from time to time."""
        if self._transport is None:
            return
        for byte in itertools.islice(self._slowly, 1):
            self._transport.write(bytes([byte]))
        if self.nonces is not None and (number := next(self.nonces)) % TICKS_PER_PING == 0:
            self._transport.write(frame(*encode(Ping(number))))

    def leave(self) -> None:
        """Close."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()


def frame(*parts: bytes | bytearray | memoryview) -> bytes:
    """A frame as ``tcp://`` carries it."""
    payload = b"".join(parts)
    return HEADER.pack(MAGIC, len(payload)) + payload


def client_hello() -> bytes:
    """What a TLS client says first."""
    words = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), words, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return words.read()
