"""What the two ends of a ``shm://`` connection share: memory, and a doorbell for each.

All of it is anonymous, so nothing is left when both processes are gone, however they ended.

The memory is sealed and can be neither shrunk nor grown: a peer that cut it off could otherwise
make this end die of SIGBUS. Its pages are allocated at once, so that a lack of memory is an error
here and no death later.

A doorbell is an eventfd; the peer writes to it to wake its owner. That it does not block is a
setting that both ends share, so a hostile peer could change it and make this end wait. It gains
nothing by that: it runs as the same user and may stop this process with a signal.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from privatelora.errors import RemoteProtocolError
from privatelora.transports.shm_ring import HEADER_NBYTES, RingReader, RingWriter

RING_NBYTES = 2**20
"""Data bytes of a ring, of which there is one per direction; both ends must have the same.

Measured with frames of 8 MiB, one way on two cores: 16 to 19 GiB/s with this size, 8 to 10 with a
quarter of it, and no more with four times as much.
"""

_DIRECTION_NBYTES = HEADER_NBYTES + RING_NBYTES
MEMORY_NBYTES = 2 * _DIRECTION_NBYTES
"""Bytes of shared memory of one connection, taken once for both ends."""

_MFD_NOEXEC_SEAL = 0x8
"""Not in the os module of Python 3.11; kernels before 6.3 do not know it."""


class Shared(NamedTuple):
    """Descriptors of what a connection shares, in the order in which they are sent."""

    memory: int
    client_doorbell: int
    listener_doorbell: int

    @classmethod
    def create(cls) -> Shared:
        """New ones. Raises OSError."""
        fds: list[int] = []
        try:
            fds.append(_create_memory())
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            return cls(*fds)
        except BaseException:
            close_all(fds)
            raise

    def check(self, peer: str) -> None:
        """Refuse, with a RemoteProtocolError, what ``create`` of the peer has not made."""
        try:
            seals = fcntl.fcntl(self.memory, fcntl.F_GET_SEALS)
        except OSError as error:
            raise RemoteProtocolError(f"{peer} sent a descriptor that is no memory") from error
        if seals & _seals() != _seals():
            raise RemoteProtocolError(f"{peer} sent memory that is not sealed against resizing")
        nbytes = os.fstat(self.memory).st_size
        if nbytes != MEMORY_NBYTES:
            raise RemoteProtocolError(
                f"{peer} sent memory of {nbytes} bytes where {MEMORY_NBYTES} are agreed"
            )
        for fd in (self.client_doorbell, self.listener_doorbell):
            kind = os.readlink(f"/proc/self/fd/{fd}")
            if kind != "anon_inode:[eventfd]" or os.get_blocking(fd):
                raise RemoteProtocolError(
                    f"{peer} sent {kind} where a non-blocking eventfd is agreed"
                )


class MappedRings:
    """The memory, mapped: a ring to write and a ring to read.

    ``is_client``: which direction is which. For the rest see the rings. Raises OSError; leaves
    the descriptor to the caller.
    """

    def __init__(
        self, memory: int, *, is_client: bool, wake_peer: Callable[[], None], peer: str
    ) -> None:
        self._mmap = mmap.mmap(memory, MEMORY_NBYTES)
        with (
            memoryview(self._mmap) as view,
            view[:_DIRECTION_NBYTES] as to_listener,
            view[_DIRECTION_NBYTES:] as to_client,
        ):
            outgoing, incoming = to_client, to_listener
            if is_client:
                outgoing, incoming = to_listener, to_client
            self.writer = RingWriter(outgoing, wake_peer, peer)
            self.reader = RingReader(incoming, wake_peer, peer)

    def close(self) -> None:
        """Unmap; the rings must not be used afterwards."""
        self.writer.release()
        self.reader.release()
        self._mmap.close()


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


def _create_memory() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("privatelora-shm", flags | _MFD_NOEXEC_SEAL)
    except OSError:
        fd = os.memfd_create("privatelora-shm", flags)
    try:
        os.ftruncate(fd, MEMORY_NBYTES)
        os.posix_fallocate(fd, 0, MEMORY_NBYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
    except BaseException:
        os.close(fd)
        raise
    return fd


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
