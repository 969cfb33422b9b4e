"""CURVE on ZeroMQ: which keys an end uses, and which clients a listener lets in."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from privatelora.errors import ConfigError
from privatelora.transports.base import CurveCredentials
from privatelora.transports.brief_log import BriefLog
from privatelora.transports.curve_keys import read_public_key, read_public_keys, read_secret_key
from privatelora.transports.zeromq_sockets import LoopSocket, OwnContext

_logger = logging.getLogger("privatelora.transports")

_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_ZAP_VERSION = b"1.0"
_ZAP_DOMAIN = b"privatelora"
_KEY_NBYTES = 32


@dataclass(frozen=True)
class ClientKeys:
    """A client's key pair and the key (Z85) that its listener must have."""

    public: bytes
    secret: bytes
    listener: bytes
    trust: Path
    """Where ``listener`` was read, for messages to people."""

    @classmethod
    def read(cls, credentials: CurveCredentials) -> ClientKeys:
        """Read the files. Raises ConfigError."""
        if credentials.trust.is_dir():
            raise ConfigError(
                f"{credentials.trust} is a folder; a client trusts exactly one listener: "
                "give its public key file"
            )
        public, secret = read_secret_key(credentials.secret_key)
        return cls(public, secret, read_public_key(credentials.trust), credentials.trust)

    def apply(self, dealer: zmq.Socket[bytes]) -> None:
        """Let a socket that is not connected yet use these keys."""
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, self.listener)


@dataclass(frozen=True)
class ListenerKeys:
    """A listener's secret key (Z85), and where the public keys of its clients are."""

    secret: bytes
    trust: Path

    @classmethod
    def read(cls, credentials: CurveCredentials) -> ListenerKeys:
        """Read the files. Raises ConfigError."""
        _public, secret = read_secret_key(credentials.secret_key)
        # Read again for each client; a mistake should show at the start.
        read_public_keys(credentials.trust)
        return cls(secret, credentials.trust)

    def apply(self, router: zmq.Socket[bytes]) -> None:
        """Let a socket that is not bound yet use these keys and ask a Doorkeeper."""
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        router.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)


class Doorkeeper:
    """Answers ZeroMQ when it asks whether a client's key is one that is trusted (ZAP, RFC 27).

    The files in ``trust`` are read for each client, so that keys can be added and removed at any
    time. Must be made before a socket of ``context`` is bound, because ZeroMQ lets everybody in
    while nobody answers. ``where``: the listener's address, for the log.
    """

    def __init__(self, context: OwnContext, trust: Path, where: str) -> None:
        self._trust = trust
        self._where = where
        self._log = BriefLog(_logger)
        answering = context.socket(zmq.REP)
        answering.bind(_ZAP_ADDRESS)
        self._socket = LoopSocket(answering, self._answer)

    def close(self) -> None:
        """Stop answering. May be repeated."""
        self._socket.close()

    def _answer(self) -> None:
        question = self._socket.socket.recv_multipart(zmq.NOBLOCK)
        _version, request_id, _domain, peer, _identity, mechanism, *keys = question
        code, text, user_id = b"400", b"refused", b""
        if mechanism == b"CURVE" and len(keys) == 1 and len(keys[0]) == _KEY_NBYTES:
            key: bytes = z85.encode(keys[0])
            if self._lets_in(key, peer.decode("ascii", "replace")):
                code, text, user_id = b"200", b"", key
        answer = [_ZAP_VERSION, request_id, code, text, user_id, b""]
        self._socket.socket.send_multipart(answer, zmq.NOBLOCK)

    def trusts(self, key: bytes) -> bool:
        """Whether a client's public key (Z85) is in the files as they are now."""
        try:
            return key in read_public_keys(self._trust)
        except ConfigError:
            return False

    def _lets_in(self, key: bytes, peer: str) -> bool:
        try:
            if key in read_public_keys(self._trust):
                return True
            reason = f"it is not among those in {self._trust}"
        except ConfigError as error:
            reason = str(error)
        self._log.warning(
            "%s refused a client from %s with the public key %s: %s",
            self._where,
            peer,
            key.decode("ascii"),
            reason,
        )
        return False
