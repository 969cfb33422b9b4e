"""``tls://host:port``: frames over one TLS 1.3 connection.

The listener always shows a certificate, and the client checks that it trusts it and that it is
for the host it dialled. Where the listener's ``trust`` is set it lets in only clients that show
a certificate which that holds. Accepted clients get a greeting of eight bytes; from then on the
stream inside is that of ``tcp://``. The byte counters count what is inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Sequence
from functools import partial

from privatelora.errors import (
    AuthError,
    ConfigError,
    ConnectError,
    PrivateLoRAError,
    TransportTimeout,
)
from privatelora.transports.address import parse_address
from privatelora.transports.base import (
    Connection,
    Credentials,
    Handler,
    Limits,
    Listener,
    TlsCredentials,
    Transport,
)
from privatelora.transports.brief_log import BriefLog
from privatelora.transports.handlers import HandlerTasks
from privatelora.transports.sockets import (
    AcceptLoop,
    contact_text,
    endpoint_text,
    open_connection,
    open_listeners,
)
from privatelora.transports.stream import StreamConnection
from privatelora.transports.tls_context import ServerContext, client_context
from privatelora.transports.tls_refusals import explain
from privatelora.transports.tls_stream import TlsStream

_logger = logging.getLogger("privatelora.transports")

MAX_HANDSHAKES = 128
"""Handshakes under way at one listener; one more ends the oldest, which is likely a dead one."""

_FAREWELL_S = 1.0
_CHECK_PEER = "check that a PrivateLoRA peer listens there with tls://, and its log"


class TlsListener(Listener):
    """Accepts TLS connections on sockets that listen already, which it owns."""

    def __init__(
        self,
        address: str,
        sockets: Sequence[socket.socket],
        handler: Handler,
        limits: Limits,
        context: ServerContext,
    ) -> None:
        self._address = address
        self._limits = limits
        self._context = context
        self._handlers = HandlerTasks(handler, address)
        self._handshakes: dict[asyncio.Task[TlsStream | None], str] = {}
        self._log = BriefLog(_logger)
        self._accept_loop = AcceptLoop(sockets, self._accepted, address)

    @property
    def address(self) -> str:
        """Contact address; of a wildcard, the one that works on this machine."""
        return self._address

    async def aclose(self) -> None:
        """Stop accepting, cancel handshakes and handlers and wait for them."""
        self._accept_loop.close()
        for task in self._handshakes:
            task.cancel()
        if self._handshakes:
            await asyncio.wait(self._handshakes)
        await self._handlers.aclose()

    def _accepted(self, sock: socket.socket) -> None:
        peer = endpoint_text("tls", sock.getpeername())
        under_way = [task for task in self._handshakes if not task.cancelling()]
        if len(under_way) >= MAX_HANDSHAKES:
            under_way[0].cancel()
            self._refused(self._handshakes[under_way[0]], "too many handshakes are under way")
        task = asyncio.get_running_loop().create_task(
            self._admit(sock, peer), name=f"handshake of {peer} at {self._address}"
        )
        self._handshakes[task] = peer
        task.add_done_callback(partial(self._done, sock))

    async def _admit(self, sock: socket.socket, peer: str) -> TlsStream | None:
        """Make a stream that is ready for frames, or refuse the peer."""
        timeout_s = self._limits.connect_timeout_s
        try:
            stream = TlsStream(sock, self._context.current())
            try:
                async with asyncio.timeout(timeout_s):
                    await stream.handshake()
                    await stream.greet()
                return stream
            except ssl.SSLError as error:
                self._refused(peer, explain(error).text)
            finally:
                self._accept_loop.charge(stream.setup_s)
            with contextlib.suppress(OSError):
                async with asyncio.timeout(_FAREWELL_S):
                    await stream.see_off()
        except TimeoutError:
            self._refused(peer, f"it did not finish the TLS handshake within {timeout_s:g} s")
        except OSError as error:
            self._refused(peer, explain(error).text)
        except PrivateLoRAError as error:
            self._refused(peer, str(error))
        except Exception:
            _logger.exception("%s: the handshake of %s failed", self._address, peer)
        return None

    def _done(self, sock: socket.socket, task: asyncio.Task[TlsStream | None]) -> None:
        # Here and not in _admit, because a task cancelled before its first step never runs.
        del self._handshakes[task]
        stream = None if task.cancelled() else task.result()
        if stream is None:
            sock.close()
        else:
            connection = _connection(stream, self._limits)
            # Of a peer alone OpenSSL says nothing without another handshake. So when any file has
            # changed, everybody has to come again.
            connection.ask_trust = partial(self._context.made, stream.context)
            self._handlers.start(connection)

    def _refused(self, peer: str, reason: str) -> None:
        self._log.warning("%s: refused %s: %s", self._address, peer, reason)


class TlsTransport(Transport):
    """``tls://host:port``."""

    async def connect(self, address: str, limits: Limits, credentials: Credentials) -> Connection:
        """Connect; see Transport.connect."""
        parsed = parse_address(address)
        parsed.require_options()
        credentials.require_only(address, "tls")
        host, _port = parsed.require_contact()
        context = client_context(credentials.tls or TlsCredentials())
        deadline = asyncio.get_running_loop().time() + limits.connect_timeout_s
        sock = await open_connection(parsed, limits.connect_timeout_s)
        try:
            async with asyncio.timeout_at(deadline):
                # Certificates do not hold the zone of a link-local address.
                stream = TlsStream(sock, context, host.partition("%")[0])
                await stream.handshake()
                if not await stream.is_greeted():
                    raise ConnectError(
                        f"cannot connect to {address}: TLS was set up, but it does not greet as a "
                        f"PrivateLoRA peer does; {_CHECK_PEER}"
                    )
        except BaseException as error:
            # Not a reset, which could overtake the alert that tells the peer why.
            sock.close()
            if isinstance(error, OSError):
                raise _connect_error(error, address, host, limits) from error
            raise
        return _connection(stream, limits)

    async def listen(
        self, address: str, handler: Handler, limits: Limits, credentials: Credentials
    ) -> Listener:
        """Listen; see Transport.listen."""
        parsed = parse_address(address)
        parsed.require_options()
        credentials.require_only(address, "tls")
        if credentials.tls is None:
            raise ConfigError(
                f"cannot listen on {address}: no certificate is set; make one with `privatelora "
                "keys new NAME --host HOST` and set tls: certificate and key"
            )
        context = ServerContext(credentials.tls)
        sockets = await open_listeners(parsed)
        return TlsListener(contact_text(parsed, sockets[0]), sockets, handler, limits, context)


def _connect_error(
    error: OSError, address: str, host: str, limits: Limits
) -> AuthError | ConnectError | TransportTimeout:
    if isinstance(error, TimeoutError):
        return TransportTimeout(
            f"cannot connect to {address}: TLS was not set up within "
            f"{limits.connect_timeout_s:g} s; {_CHECK_PEER}"
        )
    refusal = explain(error, host)
    if refusal.about_identity:
        return AuthError(f"cannot connect to {address}: {refusal.text}")
    return ConnectError(f"cannot connect to {address}: {refusal.text}; {_CHECK_PEER}")


def _connection(stream: TlsStream, limits: Limits) -> StreamConnection:
    return StreamConnection(stream, limits, limits.spin_s or 0.0)
