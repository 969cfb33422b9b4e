"""ZeroMQ sockets on the event loop, and the options that all of them have.

Not zmq.asyncio: its futures and tasks cost more than the round trip of a small frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import weakref
from collections.abc import Callable
from typing import NamedTuple

import zmq

from privatelora.transports.zeromq_protocol import MAX_MESSAGE_NBYTES, MAX_MESSAGES_IN_TRANSIT

HEARTBEAT_S = 10.0
"""Pause before a silent peer is asked for a sign of life; it has twice as long to give one."""

_MAX_MESSAGES = 256
"""Taken per event, so that a flood cannot hold the loop."""
_MAX_QUEUED_MESSAGES = 2 * (MAX_MESSAGES_IN_TRANSIT + 64)
"""Arrived and not taken, per peer. Beyond it ZeroMQ stops reading from that peer, its answers to
heartbeats included, so peers that keep to their credit must not get there while the event loop
is busy. Twice, because ZeroMQ counts taken messages late, by up to half; 64 for CREDIT and END."""
_NUM_DESCRIPTORS = 16
"""More than a context, with the sockets of a listener, opens before it has a peer."""
_NEVER_MS = 2**31 - 1
_MONITOR_ADDRESS = "inproc://monitor"
_EVENT = struct.Struct("=Hi")  # zmq_socket_monitor(3)
# Plain numbers: the members of zmq's enumerations cost a microsecond at each use.
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)


class Event(NamedTuple):
    """What a monitor tells: ``value`` is a descriptor, errno or code, depending on ``kind``."""

    kind: int
    value: int


class LoopSocket:
    """Takes what arrives at a ZeroMQ socket, which it owns, on the running event loop.

    ``take`` takes exactly one message that is there; ``on_empty`` is called from the event loop
    whenever there are no more. The descriptor of a ZeroMQ socket is no state but a signal that
    something changed, and any call on the socket may consume the signal. So after each call
    somebody has to look: ``receive`` does, and ``sent`` must be called after sending.
    """

    __slots__ = ("_again", "_fd", "_loop", "_on_empty", "_take", "socket")

    def __init__(
        self,
        zmq_socket: zmq.Socket[bytes],
        take: Callable[[], None],
        on_empty: Callable[[], None] | None = None,
    ) -> None:
        self.socket = zmq_socket
        self._take = take
        self._on_empty = on_empty
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.Handle | None = None
        self._fd = zmq_socket.fileno()
        self._loop.add_reader(self._fd, self._on_signal)
        self.receive_later()

    def has_input(self) -> bool:
        """Whether a message is there."""
        return bool(int(self.socket.getsockopt(_EVENTS)) & _POLLIN)

    def receive(self) -> bool:
        """Take what is there; return whether that was all."""
        for _ in range(_MAX_MESSAGES):
            if self.socket.closed or not self.has_input():
                return True
            self._take()
        self.receive_later()
        return False

    def receive_later(self) -> None:
        """Do as if the descriptor had signalled."""
        if self._again is None and not self.socket.closed:
            self._again = self._loop.call_soon(self._on_signal)

    def sent(self) -> None:
        """Look after messages whose signal the sending of one may have consumed."""
        if self.has_input():
            self.receive_later()

    def close(self) -> None:
        """Close the socket. May be repeated."""
        if self.socket.closed:
            return
        self._loop.remove_reader(self._fd)
        if self._again is not None:
            self._again.cancel()
        self.socket.close(linger=0)

    def _on_signal(self) -> None:
        self._again = None
        if self.receive() and self._on_empty is not None and not self.socket.closed:
            self._on_empty()


class OwnContext:
    """A context and its sockets, which end together, even if nobody closes them.

    Collected as garbage in the wrong order they would wait for each other for ever. Raises
    zmq.ZMQError, as do the methods.
    """

    def __init__(self) -> None:
        _require_descriptors()
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._close = weakref.finalize(self, _close_all, self._context, self._sockets)

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """A socket without any options."""
        zmq_socket = self._context.socket(kind)
        self._sockets.append(zmq_socket)
        return zmq_socket

    def peer_socket(self, kind: int) -> zmq.Socket[bytes]:
        """A socket with the options that every one towards a peer has."""
        zmq_socket = self.socket(kind)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IPV6, 1),
            (zmq.MAXMSGSIZE, MAX_MESSAGE_NBYTES),
            (zmq.RCVHWM, _MAX_QUEUED_MESSAGES),
            # Sending never waits in ZeroMQ: a ROUTER could not say for whom. Credits bound it.
            (zmq.SNDHWM, 0),
            # A new link would be another connection. Not -1, which can drop what has arrived.
            (zmq.RECONNECT_IVL, _NEVER_MS),
            (zmq.HEARTBEAT_IVL, round(HEARTBEAT_S * 1000)),
            (zmq.HEARTBEAT_TIMEOUT, round(2 * HEARTBEAT_S * 1000)),
            (zmq.HEARTBEAT_TTL, round(2 * HEARTBEAT_S * 1000)),
        ):
            zmq_socket.setsockopt(option, value)
        return zmq_socket

    def monitor(self, watched: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
        """A socket that receives ``events`` of the watched one, the only one of this context."""
        watched.monitor(_MONITOR_ADDRESS, events)
        monitor = self.socket(zmq.PAIR)
        # A full queue would stop the thread that serves every peer, and with it closing.
        monitor.setsockopt(zmq.RCVHWM, 0)
        monitor.connect(_MONITOR_ADDRESS)
        return monitor

    def close(self) -> None:
        """Close all sockets, dropping what they hold, and every descriptor. May be repeated."""
        self._close()


def take_event(monitor: zmq.Socket[bytes]) -> Event:
    """The next event; there must be one."""
    numbers, _endpoint = monitor.recv_multipart(zmq.NOBLOCK)
    return Event(*_EVENT.unpack(numbers))


def take_message(zmq_socket: zmq.Socket[bytes]) -> tuple[zmq.Frame, bool]:
    """The next message, or the last part of one in several; and whether it came in one.

    There must be a message. The parts before the last are dropped; no peer of ours sends any.
    """
    frame = zmq_socket.recv(zmq.NOBLOCK, copy=False)
    is_single = not frame.more
    while frame.more:
        frame = zmq_socket.recv(zmq.NOBLOCK, copy=False)
    return frame, is_single


def _close_all(context: zmq.Context[zmq.Socket[bytes]], sockets: list[zmq.Socket[bytes]]) -> None:
    for zmq_socket in sockets:
        zmq_socket.close(linger=0)
    context.term()


def _require_descriptors() -> None:
    """Raise ZMQError if there are too few: ZeroMQ would end the process."""
    with contextlib.ExitStack() as stack:
        for _ in range(_NUM_DESCRIPTORS):
            try:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            except OSError as error:
                raise zmq.ZMQError(error.errno) from error
