"""A ByteStream over two rings in shared memory, with a doorbell for each end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Sequence

from privatelora.transports.base import Buffer
from privatelora.transports.flow import wake
from privatelora.transports.shm_shared import MappedRings, Shared


class ShmStream:
    """See ByteStream. Owns ``sock``, whose handshake is over, and what is in ``shared``.

    The peer rings this end's doorbell when it moves past a mark that this end has set in the
    rings. Marks are set from the event loop, which may sleep next, and once passed they are
    spent: an end that gets along without the loop, as when it spins, is rung for at most once.
    The socket has no more to say; whatever happens on it means that the peer is gone.

    Raises OSError if the memory cannot be mapped; then it owns nothing.
    """

    identity: str | None = None

    def __init__(self, sock: socket.socket, shared: Shared, *, is_client: bool, peer: str) -> None:
        self.peer = peer
        self._rings = MappedRings(
            shared.memory, is_client=is_client, wake_peer=self._ring, peer=peer
        )
        self._incoming, self._outgoing = self._rings.reader, self._rings.writer
        self._doorbell, self._peers_doorbell = shared.client_doorbell, shared.listener_doorbell
        if not is_client:
            self._doorbell, self._peers_doorbell = self._peers_doorbell, self._doorbell
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._doorbell, self._on_doorbell)
        self._loop.add_reader(sock.fileno(), self._on_peer_gone)
        self._on_readable: Callable[[], None] | None = None
        self._will_pump = False
        self._room_waiter: asyncio.Future[None] | None = None
        self._peer_gone = False
        self._closed = False
        os.close(shared.memory)

    def recv_into(self, buffer: memoryview | bytearray, /) -> int:
        """See ByteStream."""
        nbytes = self._incoming.read_into(buffer)
        if nbytes or self._incoming.ended:
            return nbytes
        # That it has gone was noticed before the look into the ring, which therefore missed
        # nothing.
        if self._peer_gone:
            raise _gone()
        raise BlockingIOError

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        """See ByteStream."""
        if self._peer_gone:
            raise _gone()
        nbytes = self._outgoing.write(buffers)
        if not nbytes:
            raise BlockingIOError
        return nbytes

    def start_reading(self, callback: Callable[[], None]) -> None:
        """See ByteStream."""
        self._on_readable = callback
        self._before_sleep()

    def stop_reading(self) -> None:
        """See ByteStream."""
        self._on_readable = None

    async def wait_writable(self, waiter: asyncio.Future[None]) -> None:
        """See ByteStream."""
        if self._peer_gone or self._outgoing.ask_for_room():
            # Once around the loop all the same: a fast peer could keep a large frame going.
            await asyncio.sleep(0)
            return
        self._room_waiter = waiter
        try:
            await waiter
        finally:
            self._room_waiter = None

    def end_sending(self) -> None:
        """See ByteStream."""
        if not self._closed:
            self._outgoing.end()

    def close(self, *, reset: bool) -> None:
        """See ByteStream. An end of the socket without one in the ring is a reset."""
        if self._closed:
            return
        self._closed = True
        self._on_readable = None
        self._loop.remove_reader(self._doorbell)
        self._loop.remove_reader(self._sock.fileno())
        os.close(self._doorbell)
        os.close(self._peers_doorbell)
        self._sock.close()
        self._rings.close()

    def _ring(self) -> None:
        try:
            os.eventfd_write(self._peers_doorbell, 1)
        except BlockingIOError:
            return  # rung so often and not answered yet that the number is at its limit

    def _on_doorbell(self) -> None:
        try:
            os.eventfd_read(self._doorbell)
        except BlockingIOError:
            return
        if self._room_waiter is not None and self._outgoing.ask_for_room():
            wake(self._room_waiter)
        if not self._will_pump:
            self._pump()

    def _on_peer_gone(self) -> None:
        self._peer_gone = True
        self._loop.remove_reader(self._sock.fileno())
        wake(self._room_waiter)
        if not self._will_pump:
            self._pump()

    def _pump(self) -> None:
        """Have what is there read, and come back if that was not all."""
        self._will_pump = False
        if self._on_readable is not None:
            self._on_readable()
            self._before_sleep()

    def _before_sleep(self) -> None:
        """Ask the peer to ring, unless there is something to read already."""
        if self._on_readable is None or self._will_pump:
            return
        if self._incoming.ask_for_data() or self._peer_gone:
            self._will_pump = True
            self._loop.call_soon(self._pump)


def _gone() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "the peer died or aborted")
