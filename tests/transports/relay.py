"""A TCP relay between two ends, that keeps and may change what passes through it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Relay:
    """Relays one connection to ``target_port`` of this machine, in threads of its own.

    ``port``: where to connect. ``up`` and ``down``: all that the client and the listener sent.
    ``change``: applied to what the listener sends from now on.
    """

    def __init__(self, target_port: int) -> None:
        self.up = bytearray()
        self.down = bytearray()
        self.change: Callable[[bytes], bytes] = bytes
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._listening.settimeout(10)
        self._sockets = [socket.create_connection(("127.0.0.1", target_port))]
        self._threads = [threading.Thread(target=self._accept)]

    def cut(self) -> None:
        """End the TCP stream to the client without a word."""
        self._sockets[1].shutdown(socket.SHUT_WR)

    def _accept(self) -> None:
        with self._listening:
            near, _peer = self._listening.accept()
        [far] = self._sockets
        self._sockets.append(near)
        self._threads.append(threading.Thread(target=self._run_up, args=(near, far)))
        self._threads[1].start()
        while data := _next(far):
            self.down += data
            _pass_on(near, self.change(data))
        _pass_on(near, b"")

    def _run_up(self, near: socket.socket, far: socket.socket) -> None:
        while data := _next(near):
            self.up += data
            _pass_on(far, data)
        _pass_on(far, b"")

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


def _next(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except OSError:
        return b""


def _pass_on(sock: socket.socket, data: bytes) -> None:
    """Send ``data``, or the end for no data."""
    with contextlib.suppress(OSError):
        sock.sendall(data)
        if not data:
            sock.shutdown(socket.SHUT_WR)
