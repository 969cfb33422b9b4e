"""A TLS 1.3 connection as a stream of bytes: OpenSSL between memory buffers and a socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from time import thread_time
from typing import TypeVar

from privatelora.errors import RemoteProtocolError
from privatelora.transports.base import Buffer
from privatelora.transports.flow import wake
from privatelora.transports.sockets import endpoint_text
from privatelora.transports.tcp import SocketStream
from privatelora.transports.tls_context import identity_of
from privatelora.transports.tls_refusals import NOT_TLS

GREETING = b"PLR1 TLS"
"""The listener's first words to a client it has accepted; see TlsStream.greet."""

_RECORD_NBYTES = 2**14
"""Most plain bytes in one TLS record (RFC 8446, section 5.1)."""
_MAX_RECORDS = 16
"""Most records encrypted before they are handed to the operating system."""
_FIRST_READ_NBYTES = 4 * 1024
"""Read at once until a peer has sent that much; most connections of an attack never do."""
_READ_NBYTES = 64 * 1024
_MAX_ANSWERS_NBYTES = 64 * 1024
"""What OpenSSL may write on its own while it reads; a peer can ask for it with every record."""
_MAX_FAREWELL_READS = 16

_PROTOCOL_ALERT = b"\x15\x03\x03\x00\x02\x02\x46"
"""A fatal alert in the clear: protocol_version (RFC 8446, section 6)."""

_T = TypeVar("_T")


class TlsStream(SocketStream):
    """A connected, configured socket, which it owns, with TLS over it, as a ByteStream.

    ``server_hostname``: the name or IP that the peer's certificate must hold; None on the
    listener's side. Until ``handshake`` has returned nothing may be sent or received.

    An end of the TCP stream that TLS did not announce (close_notify) is an OSError: somebody may
    have cut the stream. Once this end has ended sending it takes the end of the TCP stream for
    the peer's, and no longer decrypts what comes before.

    Raises OSError if the peer is already gone.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, server_hostname: str | None = None
    ) -> None:
        super().__init__(sock, endpoint_text("tls", sock.getpeername()))
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname is None, server_hostname
        )
        self._received = memoryview(bytearray(_FIRST_READ_NBYTES))
        self._is_record_open = False
        self._on_readable: Callable[[], None] | None = None
        self._announcement: asyncio.Handle | None = None
        self._unsent: Buffer = b""
        """Encrypted, and not yet taken by the operating system."""
        self._has_ended = False
        self.setup_s = 0.0
        """Processor time that setting up took."""

    @property
    def context(self) -> ssl.SSLContext:
        """What it was made with."""
        return self._tls.context

    # Setting up

    async def handshake(self) -> None:
        """Agree on keys and check the peer's certificate; ssl.SSLError or another OSError."""
        await self._carry_on(self._tls.do_handshake)
        certificate = self._tls.getpeercert(binary_form=True)
        if certificate is not None:
            self.identity = identity_of(certificate)

    async def greet(self) -> None:
        """Tell a client that it was accepted.

        In TLS 1.3 a client has ended its handshake before the listener sees its certificate.
        """
        await self._carry_on(partial(self._tls.write, GREETING))

    async def is_greeted(self) -> bool:
        """Wait for the listener's first words; ssl.SSLError if it refuses this end instead."""
        words = await self._carry_on(partial(self._tls.read, len(GREETING)))
        self._is_record_open = self._tls.pending() > 0
        return words == GREETING

    async def see_off(self) -> None:
        """Let a refused peer read why: closing with bytes unread would drop what was sent."""
        super().end_sending()
        for _ in range(_MAX_FAREWELL_READS):
            try:
                if not super().recv_into(self._received):
                    return
            except BlockingIOError:
                await self._wait_readable()

    async def _carry_on(self, step: Callable[[], _T]) -> _T:
        """Call ``step`` until it misses nothing from the peer, and send what it wrote."""
        while True:
            started = thread_time()
            try:
                try:
                    result = step()
                finally:
                    self.setup_s += thread_time() - started
            except ssl.SSLWantReadError:
                await self._send_written()
                await self._receive_more()
            except ssl.SSLError as error:
                if error.reason in NOT_TLS:
                    self._outgoing.write(_PROTOCOL_ALERT)  # OpenSSL says nothing
                # An alert, which tells the peer the reason. If it cannot, this end still knows.
                with contextlib.suppress(OSError):
                    await self._send_written()
                raise
            else:
                await self._send_written()
                return result

    async def _send_written(self) -> None:
        self._unsent = self._outgoing.read()
        while self._unsent:
            try:
                self._flush()
            except BlockingIOError:
                await self.wait_writable(self._loop.create_future())

    async def _receive_more(self) -> None:
        while True:
            try:
                self._fill()
            except BlockingIOError:
                await self._wait_readable()
            else:
                return

    async def _wait_readable(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        super().start_reading(partial(wake, waiter))
        try:
            await waiter
        finally:
            super().stop_reading()

    # Receiving

    def recv_into(self, buffer: memoryview | bytearray, /) -> int:
        """See ByteStream. Reads at most one record."""
        if self._has_ended:
            return super().recv_into(buffer)
        while True:
            if self._is_record_open or self._incoming.pending:
                try:
                    return self._decrypt(buffer)
                except ssl.SSLWantReadError:
                    pass
            self._fill()

    def _decrypt(self, buffer: memoryview | bytearray) -> int:
        size = min(len(buffer), _RECORD_NBYTES)
        try:
            nbytes: int = self._tls.read(size, buffer)  # type: ignore[assignment]  # with a buffer
        except ssl.SSLWantReadError:
            raise
        except ssl.SSLError as error:
            raise RemoteProtocolError(
                f"{self.peer} broke the rules of TLS ({error.reason}); somebody may have "
                "tampered with the connection; connect again"
            ) from error
        self._is_record_open = nbytes == size < _RECORD_NBYTES
        if self._is_record_open or self._incoming.pending:
            self._announce()
        return nbytes

    def _fill(self) -> None:
        """Fetch encrypted bytes; BlockingIOError if there are none."""
        nbytes = super().recv_into(self._received)
        if not nbytes:
            raise ConnectionAbortedError(
                errno.ECONNABORTED, "it was cut off without the end mark of TLS"
            )
        if self._outgoing.pending > _MAX_ANSWERS_NBYTES:
            raise RemoteProtocolError(
                f"{self.peer} keeps asking for new TLS keys; use a PrivateLoRA peer"
            )
        self._incoming.write(self._received[:nbytes])
        if nbytes == len(self._received) < _READ_NBYTES:
            self._received = memoryview(bytearray(_READ_NBYTES))

    def start_reading(self, callback: Callable[[], None]) -> None:
        """See ByteStream."""
        super().start_reading(callback)
        self._on_readable = callback
        if self._is_record_open or self._incoming.pending:
            self._announce()

    def stop_reading(self) -> None:
        """See ByteStream."""
        super().stop_reading()
        self._on_readable = None

    def _announce(self) -> None:
        """Have the callback called: the descriptor is silent about bytes that are here already."""
        if self._announcement is None:
            self._announcement = self._loop.call_soon(self._announced)

    def _announced(self) -> None:
        self._announcement = None
        if self._on_readable is not None:
            self._on_readable()

    # Sending

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        """See ByteStream.

        While the operating system has not taken all that was encrypted, the last byte counts as
        not sent. So the caller comes back until it has, and knows that it is amid something.
        """
        if self._unsent:
            self._flush()
            return 1
        nbytes = 0
        for record in islice(_records(buffers), _MAX_RECORDS):
            nbytes += self._tls.write(record)
        self._unsent = self._outgoing.read()
        try:
            self._flush()
        except BlockingIOError:
            if nbytes == 1:
                raise
            return nbytes - 1
        return nbytes

    def _flush(self) -> None:
        """Hand over what is encrypted; BlockingIOError if not all of it was taken."""
        nbytes = self._sock.send(self._unsent)
        if nbytes < len(self._unsent):
            self._unsent = memoryview(self._unsent)[nbytes:]
            raise BlockingIOError
        self._unsent = b""

    # Ending

    def end_sending(self) -> None:
        """See ByteStream."""
        self._has_ended = True
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()  # writes close_notify, and would then read the peer's
        self._unsent = b"".join((self._unsent, self._outgoing.read()))
        try:
            self._flush()
        except BlockingIOError:
            self._loop.add_writer(self._fd, self._go_on_ending)
        else:
            super().end_sending()

    def close(self, *, reset: bool) -> None:
        """See ByteStream."""
        self._on_readable = None
        super().close(reset=reset)

    def _go_on_ending(self) -> None:
        try:
            self._flush()
            super().end_sending()
        except BlockingIOError:
            return
        except OSError:
            pass  # the peer has gone, and reading will show it
        self._loop.remove_writer(self._fd)


def _records(buffers: Sequence[Buffer]) -> Iterator[Buffer]:
    """Cut ``buffers`` into records as long as possible; only parts of one record are joined."""
    parts: list[memoryview] = []
    room = _RECORD_NBYTES
    for buffer in buffers:
        rest = memoryview(buffer)
        if not rest.nbytes:
            continue  # with a zero in its shape it could not be cast
        rest = rest.cast("B")
        while len(rest) >= room:
            parts.append(rest[:room])
            yield parts[0] if len(parts) == 1 else b"".join(parts)
            rest = rest[room:]
            parts, room = [], _RECORD_NBYTES
        parts.append(rest)
        room -= len(rest)
    if room < _RECORD_NBYTES:
        yield b"".join(parts)
