"""The listener's end: one ROUTER socket for all clients, in a context of its own.

Messages name their client by a routing id, which ZeroMQ makes for each link. That a link is gone
comes from a monitor, in the order in which things happened to the links but by descriptor, and
descriptors are used again. These rules keep the two apart:

- Before a client is noted, all events there are are taken. So whatever event comes later is not
  about a link older than this client's, and "descriptor 7 is gone" ends every client with
  descriptor 7 that is noted then.
- A client that was gone before it was noted is never heard of again. So a connection begins only
  when the client has repeated a token that it was sent after it was noted.
- A client that is gone is forgotten when the socket has run empty, as what it sent before may
  still be there.

ZeroMQ cannot close one client's link. A client that breaks the rules is told that its connection
is over and is not listened to any more. Nor does ZeroMQ bound the number of parts of a message:
where clients are not trusted with this machine's memory, let CURVE keep strangers out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import socket
from collections.abc import Sequence
from functools import partial

import zmq

from privatelora.errors import AuthError, ConnectError, RemoteProtocolError
from privatelora.transports.address import Address
from privatelora.transports.base import Handler, Limits, Listener
from privatelora.transports.brief_log import BriefLog
from privatelora.transports.handlers import HandlerTasks
from privatelora.transports.zeromq_connection import Link, ZmqConnection
from privatelora.transports.zeromq_curve import Doorkeeper, ListenerKeys
from privatelora.transports.zeromq_endpoints import (
    endpoint_text,
    is_own_user,
    peer_descriptor,
    peer_host,
    peer_key,
    peer_process,
)
from privatelora.transports.zeromq_protocol import (
    ABORT_MESSAGE,
    ACCEPT,
    CONFIRM,
    OPEN_MESSAGE,
    TOKEN_NBYTES,
    greeting,
    parse_greeting,
)
from privatelora.transports.zeromq_sockets import (
    LoopSocket,
    OwnContext,
    take_event,
    take_message,
)

_logger = logging.getLogger("privatelora.transports")

_HANDSHAKE_FAILED = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
# Not ACCEPT_FAILED: without free descriptors ZeroMQ reports that without end.
_WATCHED = int(zmq.EVENT_DISCONNECTED) | _HANDSHAKE_FAILED
_MORE = int(zmq.SNDMORE | zmq.NOBLOCK)
_ROUTING_ID_NBYTES = 5
"""A zero and a counter, where the client did not choose its own."""
_REASONS = {
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): "only one of the two ends uses CURVE",
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): (
        "it expects another public key of this listener, or what it sends is changed on its way"
    ),
}


class ZmqListener(Listener):
    """Accepts connections on plain sockets that listen already, which it owns.

    Raises ConnectError; the sockets are closed then.
    """

    def __init__(
        self,
        address: Address,
        sockets: Sequence[socket.socket],
        handler: Handler,
        limits: Limits,
        keys: ListenerKeys | None,
    ) -> None:
        self._address = str(address)
        self._handlers = HandlerTasks(handler, self._address)
        self._router = _Router(address, sockets, self._handlers, limits, keys)

    @property
    def address(self) -> str:
        """Contact address; of a wildcard, the one that works on this machine."""
        return self._address

    async def aclose(self) -> None:
        """Stop accepting, cancel the handlers and wait for them.

        While a handler that called this still uses its connection, the port stays taken.
        """
        self._router.stop_accepting()
        await self._handlers.aclose()


class _Client(Link):
    """One client, from its first message until its link is gone."""

    __slots__ = ("_router", "connection", "descriptor", "is_over", "peer", "routing_id", "token")

    def __init__(self, router: _Router, routing_id: bytes, descriptor: int, peer: str) -> None:
        self._router = router
        self.routing_id = routing_id
        self.descriptor = descriptor
        self.peer = peer
        self.token: bytes | None = None
        self.connection: ZmqConnection | None = None
        self.is_over = False

    def post(self, message: bytes) -> bool:
        """Send a message; see Link.post."""
        return self._router.post(self, message)

    def receive(self) -> None:
        """Hand what has arrived to all connections."""
        self._router.receive()

    def release(self, *, reset: bool) -> None:
        """Stop listening to this client."""
        self.connection = None
        self.is_over = True
        if reset:
            self.post(ABORT_MESSAGE)
        self._router.close_if_done()


class _Router:
    """The socket, and who is behind it."""

    def __init__(
        self,
        address: Address,
        sockets: Sequence[socket.socket],
        handlers: HandlerTasks,
        limits: Limits,
        keys: ListenerKeys | None,
    ) -> None:
        self._address = address
        self._handlers = handlers
        self._limits = limits
        self._is_local = sockets[0].family == socket.AF_UNIX
        self._must_be_own_user = self._is_local and keys is None
        self._clients: dict[bytes, _Client] = {}
        self._gone: list[_Client] = []
        self._numbers = itertools.count(1)
        self._accepting = True
        self._log = BriefLog(_logger)
        self._doorkeeper: Doorkeeper | None = None
        with contextlib.ExitStack() as undo:
            for sock in sockets:
                undo.callback(sock.close)
            try:
                self._context = OwnContext()
                undo.callback(self._context.close)
                router = self._context.peer_socket(zmq.ROUTER)
                router.setsockopt(zmq.ROUTER_MANDATORY, 1)
                monitor = self._context.monitor(router, _WATCHED)
                if keys is not None:
                    keys.apply(router)
                    self._doorkeeper = Doorkeeper(self._context, keys.trust, str(address))
                    undo.callback(self._doorkeeper.close)
                for sock in sockets:
                    router.setsockopt(zmq.USE_FD, sock.fileno())
                    router.bind(endpoint_text((sock.family, sock.getsockname())))
                    sock.detach()
            except zmq.ZMQError as error:
                raise ConnectError(
                    f"cannot listen on {address}: {error}; check the system's limits"
                ) from error
            undo.pop_all()
        self._socket = LoopSocket(router, self._take_message, self._on_empty)
        self._events = LoopSocket(monitor, self._take_event)

    def post(self, client: _Client, message: bytes) -> bool:
        """Send a message to a client; False if it is gone."""
        router = self._socket.socket
        try:
            router.send(client.routing_id, _MORE)
            router.send(message, zmq.NOBLOCK)
        except zmq.ZMQError:
            if client.connection is None:
                # Perhaps it was gone before it was noted; then no event will tell.
                self._clients.pop(client.routing_id, None)
            return False
        self._socket.sent()
        return True

    def receive(self) -> None:
        """Hand what has arrived to the clients' connections."""
        self._socket.receive()

    def stop_accepting(self) -> None:
        """Refuse new clients, and close as soon as no connection is left. May be repeated."""
        # ZeroMQ's unbind would end the connections too.
        self._accepting = False
        self.close_if_done()

    def close_if_done(self) -> None:
        """Close everything if no client may come and none is connected."""
        if self._accepting or any(client.connection for client in self._clients.values()):
            return
        self._clients.clear()
        self._events.close()
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.close()

    def _take_message(self) -> None:
        routing_id = self._socket.socket.recv(zmq.NOBLOCK)
        frame, is_single = take_message(self._socket.socket)
        client = self._clients.get(routing_id) or self._note(routing_id, frame)
        if client.connection is not None:
            if is_single:
                client.connection.on_message(frame.buffer)
            else:
                client.connection.violated("a message in several parts")
        elif not client.is_over:
            try:
                self._open(client, frame, is_single)
            except (AuthError, RemoteProtocolError) as error:
                self._log.warning("%s refused a client: %s", self._address, error)
                client.release(reset=True)

    def _note(self, routing_id: bytes, frame: zmq.Frame) -> _Client:
        while self._events.has_input():
            self._take_event()
        name = f"client {next(self._numbers)}"
        if self._is_local:
            peer = f"{self._address} ({name}, {peer_process(frame)})"
        else:
            peer = f"{Address(self._address.scheme, peer_host(frame))} ({name})"
        client = _Client(self, routing_id, peer_descriptor(frame), peer)
        self._clients[routing_id] = client
        return client

    def _open(self, client: _Client, frame: zmq.Frame, is_single: bool) -> None:
        """The next step to a connection. Raises RemoteProtocolError or AuthError."""
        if not self._accepting:
            client.release(reset=True)
        elif client.token is None:
            is_chosen = len(client.routing_id) != _ROUTING_ID_NBYTES or client.routing_id[0]
            if frame.buffer != OPEN_MESSAGE or not is_single or is_chosen:
                raise RemoteProtocolError(
                    f"{client.peer} does not open a connection as PrivateLoRA of this version does"
                )
            if self._must_be_own_user and not is_own_user(peer_process(frame)):
                raise AuthError(f"{client.peer} is of another user; use CURVE keys")
            client.token = secrets.token_bytes(TOKEN_NBYTES)
            client.post(greeting(ACCEPT, client.token, self._limits.max_queued_nbytes))
        else:
            token, window_nbytes = parse_greeting(frame.buffer, CONFIRM, client.peer)
            if token != client.token or not is_single:
                raise RemoteProtocolError(f"{client.peer} confirms what it was not offered")
            identity = None if self._doorkeeper is None else f"curve:{peer_key(frame)}"
            client.connection = ZmqConnection(
                client.peer, self._limits, client, window_nbytes, identity
            )
            if self._doorkeeper is not None:
                trusts = partial(self._doorkeeper.trusts, peer_key(frame).encode("ascii"))
                client.connection.ask_trust = trusts
            self._handlers.start(client.connection)

    def _take_event(self) -> None:
        kind, value = take_event(self._events.socket)
        if kind == zmq.EVENT_DISCONNECTED:
            gone = [client for client in self._clients.values() if client.descriptor == value]
            self._gone += gone
            if gone:
                self._socket.receive_later()
        else:
            reason = _REASONS.get(value, "it left or broke off the ZeroMQ handshake")
            self._log.warning("%s refused a client: %s", self._address, reason)

    def _on_empty(self) -> None:
        gone, self._gone = self._gone, []
        for client in gone:
            if self._clients.get(client.routing_id) is client:
                del self._clients[client.routing_id]
            if client.connection is not None:
                client.connection.lost("was lost")
