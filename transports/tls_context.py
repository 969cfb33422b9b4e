"""From the files in TlsCredentials to SSL contexts: TLS 1.3, and errors that name the file."""

from __future__ import annotations

import hashlib
import logging
import ssl
from pathlib import Path
from typing import NoReturn

from privatelora.errors import ConfigError
from privatelora.transports.base import TlsCredentials

_logger = logging.getLogger("privatelora.transports")

_MAX_FILE_NBYTES = 2**20
_TRUST_SUFFIXES = (".crt", ".pem")
_MAKE_KEYS = "make keys with `privatelora keys new`"
_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")

# path, then what stat says, or the error number it fails with
_FileState = tuple[object, ...]


def client_context(credentials: TlsCredentials) -> ssl.SSLContext:
    """What a client connects with: it always checks the listener's certificate and its name.

    Raises ConfigError.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    if credentials.certificate is not None or credentials.private_key is not None:
        _load_identity(context, credentials)
    if credentials.trust is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _load_trust(context, credentials.trust)
    return context


def server_context(credentials: TlsCredentials) -> ssl.SSLContext:
    """What a listener accepts with: it asks for certificates if ``trust`` is set.

    Raises ConfigError.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # sessions are not resumed
    _load_identity(context, credentials)
    if credentials.trust is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_trust(context, credentials.trust)
    return context


class ServerContext:
    """A listener's context, made anew when a file it was made from has changed.

    So a peer is let in or shut out, and a certificate renewed, without a restart. Making one
    raises ConfigError.
    """

    def __init__(self, credentials: TlsCredentials) -> None:
        self._credentials = credentials
        self._state = _file_states(credentials)
        self._context = server_context(credentials)

    def current(self) -> ssl.SSLContext:
        """The context that the files say now; ConfigError while they are not usable."""
        state = _file_states(self._credentials)
        if state != self._state:
            self._context = server_context(self._credentials)
            self._state = state
        return self._context

    def made(self, context: ssl.SSLContext) -> bool:
        """Whether ``context`` is still what the files say; not while they are not usable."""
        try:
            return self.current() is context
        except ConfigError:
            return False


def identity_of(certificate: bytes) -> str:
    """What ``Connection.identity`` calls a peer with this certificate (DER)."""
    return f"tls:{hashlib.sha256(certificate).hexdigest()}"


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A peer's own certificate can be trusted without the authority that issued it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _load_identity(context: ssl.SSLContext, credentials: TlsCredentials) -> None:
    certificate, key = credentials.certificate, credentials.private_key
    if certificate is None or key is None:
        missing = "certificate" if certificate is None else "private key"
        raise ConfigError(
            f"tls:// needs a certificate and its key; the {missing} is not set; set both, and "
            f"{_MAKE_KEYS} if you have none"
        )
    _read_pem(certificate, "certificate", b"-----BEGIN CERTIFICATE-----")
    _read_pem(key, "private key", b"PRIVATE KEY-----")

    def refuse_to_ask() -> NoReturn:
        raise ConfigError(
            f"the TLS private key {key} has a pass phrase, which nobody is there to type; store "
            f"it without one: openssl pkey -in {key} -out NEW_FILE"
        )

    try:
        _warn_if_others_can_read(key)
        context.load_cert_chain(certificate, key, refuse_to_ask)
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            raise ConfigError(
                f"the TLS private key {key} does not belong to the certificate {certificate}; "
                "name the two files that were made together"
            ) from error
        reason = (error.reason or "damaged").replace("_", " ").lower()
        raise ConfigError(
            f"cannot use the TLS certificate {certificate} with the key {key} ({reason}); "
            f"replace them, or {_MAKE_KEYS}"
        ) from error
    except OSError as error:
        raise _unreadable(key, "private key", error) from error


def _load_trust(context: ssl.SSLContext, trust: Path) -> None:
    try:
        files = _trust_files(trust)
    except OSError as error:
        raise _unreadable(trust, "trust", error) from error
    if not files:
        raise ConfigError(
            f"the TLS trust folder {trust} holds no *.crt or *.pem file; put the certificates "
            "of the peers to trust there"
        )
    for file in files:
        data = _read(file, "trust")
        try:
            # Only comments between certificates may be in another encoding.
            context.load_verify_locations(cadata=data.decode("ascii", errors="ignore"))
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"the TLS trust file {file} does not hold certificates in PEM format; "
                "replace or remove it"
            ) from error


def _trust_files(trust: Path) -> list[Path]:
    if not trust.is_dir():
        return [trust]
    return sorted(file for file in trust.iterdir() if file.suffix in _TRUST_SUFFIXES)


def _file_states(credentials: TlsCredentials) -> list[_FileState]:
    """Something that differs when a file was changed, added or removed."""
    files = [credentials.certificate, credentials.private_key]
    states: list[_FileState] = []
    try:
        if credentials.trust is not None:
            files += _trust_files(credentials.trust)
    except OSError as error:
        states.append((credentials.trust, error.errno))
    for file in files:
        if file is None:
            continue
        try:
            stat = file.stat()
        except OSError as error:
            states.append((file, error.errno))
        else:
            states.append((file, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return states


def _read(path: Path, role: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_NBYTES + 1)
    except OSError as error:
        raise _unreadable(path, role, error) from error
    if len(data) > _MAX_FILE_NBYTES:
        raise ConfigError(
            f"the TLS {role} {path} is larger than {_MAX_FILE_NBYTES} bytes; name the right file"
        )
    return data


def _read_pem(path: Path, role: str, mark: bytes) -> None:
    if mark not in _read(path, role):
        raise ConfigError(
            f"the TLS {role} {path} holds no {role} in PEM format; name the right file, or "
            f"{_MAKE_KEYS}"
        )


def _unreadable(path: Path, role: str, error: OSError) -> ConfigError:
    reason = (error.strerror or str(error)).lower()
    return ConfigError(
        f"cannot read the TLS {role} {path}: {reason}; check the path and its permissions, or "
        f"{_MAKE_KEYS}"
    )


def _warn_if_others_can_read(key: Path) -> None:
    mode = key.stat().st_mode & 0o777
    if mode & 0o077:
        _logger.warning(
            "the TLS private key %s is open to other users (mode %03o): chmod 600 %s",
            key,
            mode,
            key,
        )
