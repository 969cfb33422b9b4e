"""The client's end: one DEALER socket, and so one TCP or IPC link, per connection.

Each has a context of its own: ending it waits until ZeroMQ has closed every descriptor, which
takes well under a millisecond, and then nothing is left behind. It costs two threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket

import zmq

from privatelora.errors import AuthError, ConnectError, PrivateLoRAError, RemoteProtocolError
from privatelora.transports.base import Limits
from privatelora.transports.sockets import Endpoint
from privatelora.transports.zeromq_connection import Link, ZmqConnection
from privatelora.transports.zeromq_curve import ClientKeys
from privatelora.transports.zeromq_endpoints import endpoint_text, is_own_user, peer_process
from privatelora.transports.zeromq_greeting import offered_mechanism
from privatelora.transports.zeromq_protocol import (
    ABORT_MESSAGE,
    ACCEPT,
    CONFIRM,
    OPEN_MESSAGE,
    greeting,
    parse_greeting,
)
from privatelora.transports.zeromq_sockets import (
    LoopSocket,
    OwnContext,
    take_event,
    take_message,
)

_NOT_CONNECTED = int(zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED)
_HANDSHAKE_FAILED = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_OTHERS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)


class _HandshakeEndedError(Exception):
    """The peer hung up before the handshake was over, and ZeroMQ cannot say why."""


async def open_connection(
    peer: str, endpoint: Endpoint, limits: Limits, keys: ClientKeys | None
) -> ZmqConnection:
    """Connect to the address that a plain socket would connect to.

    ``peer``: the contact address, for messages to people. Raises OSError if nothing listens
    there, AuthError, or ConnectError. Never gives up by itself: cancel it.
    """
    try:
        link = _DealerLink(peer, endpoint, limits, keys)
    except zmq.ZMQError as error:
        raise ConnectError(
            f"cannot connect to {peer}: {error}; check the system's limits"
        ) from error
    try:
        return await link.opened
    except BaseException as error:
        link.release(reset=True)
        if not isinstance(error, _HandshakeEndedError):
            raise
    raise _explained(peer, keys, await offered_mechanism(endpoint))


def _explained(peer: str, keys: ClientKeys | None, mechanism: str | None) -> PrivateLoRAError:
    if mechanism is None:
        return ConnectError(
            f"cannot connect to {peer}: what answers there does not speak ZeroMQ; "
            "check the address and its scheme"
        )
    if keys is None:
        if mechanism == "NULL":
            return ConnectError(
                f"cannot connect to {peer}: it hung up at once; check its log and try again"
            )
        return AuthError(
            f"{peer} asks for {mechanism} keys; set the curve keys of this end and the public "
            "key of the listener, and let the listener trust this end's"
        )
    if mechanism != "CURVE":
        return AuthError(
            f"{peer} does not use CURVE and so cannot prove what it is; give it keys, or remove "
            "the curve settings here if the way to it is safe"
        )
    return AuthError(
        f"{peer} does not have the key in {keys.trust}; get its public key file again from "
        "whoever runs it, and if it is still this one, somebody else answers at that address"
    )


class _DealerLink(Link):
    """The socket of one connection. ``opened``: the connection, or why there is none."""

    def __init__(
        self, peer: str, endpoint: Endpoint, limits: Limits, keys: ClientKeys | None
    ) -> None:
        self.opened: asyncio.Future[ZmqConnection]
        self.opened = asyncio.get_running_loop().create_future()
        self._peer = peer
        self._limits = limits
        self._keys = keys
        self._must_be_own_user = endpoint[0] == socket.AF_UNIX and keys is None
        self._connection: ZmqConnection | None = None
        self._is_connected = self._shook_hands = False
        self._loss: str | None = None
        self._context = OwnContext()
        try:
            dealer = self._context.peer_socket(zmq.DEALER)
            if keys is not None:
                keys.apply(dealer)
            watched = int(_OTHERS) | _NOT_CONNECTED | _HANDSHAKE_FAILED
            monitor = self._context.monitor(dealer, watched)
            dealer.connect(endpoint_text(endpoint))
            # The peer may have hung up by now; why is among the events.
            with contextlib.suppress(zmq.Again):
                dealer.send(OPEN_MESSAGE, zmq.NOBLOCK)
        except BaseException:
            self._context.close()
            raise
        self._dealer = LoopSocket(dealer, self._take_message, self._on_empty)
        self._events = LoopSocket(monitor, self._take_event)

    def post(self, message: bytes) -> bool:
        """Send a message; see Link.post."""
        try:
            self._dealer.socket.send(message, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        self._dealer.sent()
        return True

    def receive(self) -> None:
        """Hand what has arrived to the connection."""
        self._dealer.receive()

    def release(self, *, reset: bool) -> None:
        """Close the socket, which the peer notices in any case. May be repeated."""
        self._events.close()
        self._dealer.close()
        self._context.close()

    def _take_message(self) -> None:
        frame, is_single = take_message(self._dealer.socket)
        if self._connection is None:
            self._take_answer(frame)
        elif is_single:
            self._connection.on_message(frame.buffer)
        else:
            self._connection.violated("a message in several parts")

    def _take_answer(self, frame: zmq.Frame) -> None:
        if self.opened.done():
            return
        if self._must_be_own_user and not is_own_user(process := peer_process(frame)):
            self._give_up(
                AuthError(
                    f"{self._peer} belongs to {process}, of another user; let the listener run as "
                    "this user, or use CURVE keys"
                )
            )
            return
        if frame.buffer == ABORT_MESSAGE:
            self._give_up(
                ConnectError(f"{self._peer} refuses the connection; see its log, and try again")
            )
            return
        try:
            token, window_nbytes = parse_greeting(frame.buffer, ACCEPT, self._peer)
        except RemoteProtocolError as error:
            self._give_up(ConnectError(f"cannot connect: {error}"))
            return
        keys = self._keys
        identity = None if keys is None else f"curve:{keys.listener.decode('ascii')}"
        self._connection = ZmqConnection(self._peer, self._limits, self, window_nbytes, identity)
        self.post(greeting(CONFIRM, token, self._limits.max_queued_nbytes))
        self.opened.set_result(self._connection)

    def _take_event(self) -> None:
        kind, _value = take_event(self._events.socket)
        if kind == zmq.EVENT_CONNECTED:
            self._is_connected = True
        elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._shook_hands = True
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._keys is not None:
            self._give_up(
                AuthError(
                    f"{self._peer} does not trust this end's public key "
                    f"{self._keys.public.decode('ascii')}; add its .pub file to those that the "
                    "listener trusts"
                )
            )
        elif kind & _HANDSHAKE_FAILED and self._connection is None:
            self._give_up(_HandshakeEndedError())
        elif kind & _HANDSHAKE_FAILED:
            # ZeroMQ 4.3.5 often fails to hang up then.
            self._is_lost("was lost: what arrives has been changed on its way")
        elif kind == zmq.EVENT_DISCONNECTED:
            self._is_lost("was lost")
        elif not self._is_connected:
            # ZeroMQ does not tell refused from unreachable.
            self._give_up(OSError(errno.ECONNREFUSED, "connection refused or host unreachable"))

    def _is_lost(self, how: str) -> None:
        self._loss = self._loss or how
        # What came before may still be there.
        self._dealer.receive_later()

    def _on_empty(self) -> None:
        if self._loss is None:
            return
        if self._connection is not None:
            self._connection.lost(self._loss)
        elif self._shook_hands:
            self._give_up(ConnectError(f"cannot connect to {self._peer}: it hung up; see its log"))
        else:
            self._give_up(_HandshakeEndedError())

    def _give_up(self, error: Exception) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)
