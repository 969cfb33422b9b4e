"""The wire between a trainer and its cloud, on which something happens at a frame of choice."""

from __future__ import annotations

from collections.abc import Callable

from privatelora.errors import ConnectionClosed
from privatelora.transports.base import Buffer, Connection, Handler

Happening = Callable[[Connection], object]
"""Takes the cloud's end."""


def cut(connection: Connection) -> None:
    """The link is lost, with whatever was on it."""
    connection.abort()


class Wires:
    """Stands before a cloud's handler; counts the frames of both directions, of all connections."""

    def __init__(self) -> None:
        self._plans: list[tuple[int, Happening]] = []
        self.num_happened = 0

    def __call__(self, handler: Handler) -> Handler:
        async def handle(connection: Connection) -> None:
            await handler(_Wire(self, connection))

        return handle

    def after(self, *num_frames: int, what: Happening = cut) -> None:
        """Let ``what`` happen before the frame that follows on so many, counted from now on.

        Of several each is counted from the one before it.
        """
        self._plans += [(number, what) for number in num_frames]

    def count(self, connection: Connection) -> None:
        """A frame is about to pass."""
        if not self._plans:
            return
        left, what = self._plans[0]
        if left:
            self._plans[0] = left - 1, what
            return
        del self._plans[0]
        self.num_happened += 1
        what(connection)


class _Wire(Connection):
    def __init__(self, wires: Wires, inner: Connection) -> None:
        self.counters = inner.counters
        self._wires = wires
        self._inner = inner
        self._is_cut = False

    @property
    def peer(self) -> str:
        return self._inner.peer

    async def send(self, *parts: Buffer) -> None:
        self._wires.count(self)
        await self._inner.send(*parts)

    async def recv(self) -> memoryview:
        frame = await self._inner.recv()
        return self._passed(frame)

    def recv_nowait(self) -> memoryview | None:
        frame = self._inner.recv_nowait()
        return None if frame is None else self._passed(frame)

    def _passed(self, frame: memoryview) -> memoryview:
        self._wires.count(self)
        if self._is_cut:
            raise ConnectionClosed("the wire was cut")
        return frame

    async def aclose(self) -> None:
        await self._inner.aclose()

    def abort(self) -> None:
        self._is_cut = True
        self._inner.abort()
