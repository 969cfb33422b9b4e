"""A relay between edges and a cloud, and what can go wrong in between.

It relays whatever sockets of Linux connect to it, one connection to the cloud for each from an
edge. Of ``shm://`` it sees the sockets alone, over which descriptors pass but no frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
from dataclasses import dataclass

Address = tuple[str, int] | str

_CHUNK_NBYTES = 65536
_MAX_DESCRIPTORS = 8
_MAX_FLIPPED_BITS = 4
_LINGER_S = 1.0
"""How long what was cut off may take to reach both ends before the sockets are closed."""
_RESET = struct.pack("ii", 1, 0)
_LISTEN_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Endpoint:
    """Where a plain socket listens or connects."""

    family: socket.AddressFamily
    kind: socket.SocketKind
    address: Address

    def open(self) -> socket.socket:
        """A socket of this kind, not blocking."""
        sock = socket.socket(self.family, self.kind)
        sock.setblocking(False)
        if self.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock


class Relay:
    """Passes on what comes to ``near``, where it listens, to ``far``, and back."""

    def __init__(self, near: Endpoint, far: Endpoint) -> None:
        self._near = near
        self._far = far
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._is_storm = False
        self.flowing = asyncio.Event()
        """Not set while nothing passes."""
        self.flowing.set()
        self.delay_s = 0.0
        self.spoilers: dict[bool, list[Spoiler]] = {True: [], False: []}
        """By direction (whether upwards): what will be done to the next bytes."""

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._listening = self._near.open()
        if self._near.family == socket.AF_INET:
            self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listening.bind(self._near.address)
        self._listening.listen(128)
        self._accepting = asyncio.create_task(self._accept(self._listening))

    async def aclose(self) -> None:
        """End all of it."""
        await self._stop_listening()
        self.drop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drop(self) -> None:
        """Reset every connection."""
        for link in tuple(self._links):
            link.reset()

    def half_open(self, *, upwards: bool) -> None:
        """Lose from now on what one end of these connections sends, and that it has ended."""
        for link in self._links:
            link.lost.add(upwards)

    async def stall(self, seconds: float) -> None:
        """Let nothing pass for a while."""
        self.flowing.clear()
        await asyncio.sleep(seconds)
        self.flowing.set()

    async def delay(self, by_s: float, seconds: float) -> None:
        """Let everything pass later for a while."""
        self.delay_s = by_s
        await asyncio.sleep(seconds)
        self.delay_s = 0.0

    async def storm(self, seconds: float, *, refuses: bool) -> None:
        """Reset every connection, and let none last for a while."""
        if refuses:
            await self._stop_listening()
        self._is_storm = True
        self.drop()
        await asyncio.sleep(seconds)
        self._is_storm = False
        if refuses:
            await self._listen_again()

    async def _stop_listening(self) -> None:
        if self._accepting is not None and self._listening is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._listening.close()

    async def _listen_again(self) -> None:
        async with asyncio.timeout(_LISTEN_PATIENCE_S):  # until whoever has the port lets it go
            while True:
                try:
                    return await self.start()
                except OSError:
                    await asyncio.sleep(0.05)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(listening)
            if self._is_storm:
                _close(near, with_reset=True)
                continue
            link = _Link(self, near, self._far)
            self._links.add(link)
            task = asyncio.create_task(link.run())
            link.task = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _, link=link: self._links.discard(link))  # type: ignore[misc]


@dataclass(frozen=True)
class Spoiler:
    """What is done to some bytes that pass by, once: truncated, or some bits flipped."""

    truncates: bool
    seed: int

    def spoil(self, data: bytes) -> bytes:
        """What is left of ``data``, which is not empty."""
        chance = random.Random(self.seed)
        if self.truncates:
            return data[: chance.randrange(len(data))]
        spoilt = bytearray(data)
        for _ in range(chance.randint(1, _MAX_FLIPPED_BITS)):
            bit = chance.randrange(8 * len(spoilt))
            spoilt[bit // 8] ^= 1 << bit % 8
        return bytes(spoilt)


class _Link:
    """One connection of an edge and the one to the cloud that goes with it."""

    def __init__(self, relay: Relay, near: socket.socket, far: Endpoint) -> None:
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._near = near
        self._far = far.open()
        self._far_address = far.address
        self._passes_descriptors = far.kind == socket.SOCK_SEQPACKET
        self._is_reset = True
        """How both sockets are closed: an end that came in order is passed on as such."""
        self.task: asyncio.Task[None] | None = None
        self.lost: set[bool] = set()
        """Directions (whether upwards) that nothing gets through any more."""

    def reset(self) -> None:
        """End it at once."""
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        near, far = self._near, self._far
        self._near.setblocking(False)
        try:
            # Nobody listens there while the cloud is down, and the edge is to notice at once.
            with contextlib.suppress(OSError):
                await self._loop.sock_connect(far, self._far_address)
                if self._passes_descriptors:
                    await self._pass_descriptors()
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(near, far, upwards=True))
                    group.create_task(self._pump(far, near, upwards=False))
                self._is_reset = False
        finally:
            _close(near, with_reset=self._is_reset)
            _close(far, with_reset=self._is_reset)

    async def _pump(self, source: socket.socket, sink: socket.socket, *, upwards: bool) -> None:
        relay = self._relay
        while True:
            try:
                data = await self._loop.sock_recv(source, _CHUNK_NBYTES)
            except OSError:
                data = b""
            await relay.flowing.wait()
            if relay.delay_s:
                await asyncio.sleep(relay.delay_s)
            if upwards not in self.lost:
                is_cut = False
                if data and relay.spoilers[upwards]:
                    spoiler = relay.spoilers[upwards].pop(0)
                    data, is_cut = spoiler.spoil(data), spoiler.truncates
                try:
                    await self._loop.sock_sendall(sink, data)
                    if is_cut:
                        self._cut_off()
                    elif not data:
                        sink.shutdown(socket.SHUT_WR)
                except OSError:  # it has gone, and its own direction tells the source
                    self.lost.add(upwards)
            if not data:
                return

    def _cut_off(self) -> None:
        """Let both ends see an end in order, and nothing more from the other."""
        self.lost |= {True, False}
        self._loop.call_later(_LINGER_S, self.reset)
        for sock in (self._near, self._far):
            sock.shutdown(socket.SHUT_WR)

    async def _pass_descriptors(self) -> None:
        """Pass on an edge's first message; sockets of this kind keep message boundaries."""
        near = self._near
        readable = asyncio.Event()
        self._loop.add_reader(near, readable.set)
        try:
            await readable.wait()
        finally:
            self._loop.remove_reader(near)
        hello, fds, _, _ = socket.recv_fds(near, _CHUNK_NBYTES, _MAX_DESCRIPTORS)
        try:
            socket.send_fds(self._far, [hello], fds)
        finally:
            for fd in fds:
                os.close(fd)


def _close(sock: socket.socket, *, with_reset: bool) -> None:
    if with_reset and sock.family == socket.AF_INET:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()
