"""Whether the address and the keys in a file can work, and who could come in or listen."""

from __future__ import annotations

import datetime
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from privatelora.errors import ConfigError, PrivateLoRAError
from privatelora.runtime.config import CloudConfig
from privatelora.runtime.host_port import NETWORK_SCHEMES, is_remote
from privatelora.runtime.link_config import LinkConfig
from privatelora.transports.address import Address, parse_address
from privatelora.transports.registry import require_known_scheme
from privatelora.transports.tls_context import client_context, server_context
from privatelora.transports.zeromq_curve import ClientKeys, ListenerKeys

SOON = datetime.timedelta(days=30)

_NAME_SCHEMES = ("inproc", "shm", "zmq+ipc")
_USED_KEYS = {"tls": "tls", "zmq+tcp": "curve", "zmq+ipc": "curve"}


@dataclass(frozen=True)
class Finding:
    """What is wrong or unwise. ``key``: of the file, dotted, or "" for the file itself."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


@dataclass
class Findings:
    """Everything that was found in one file."""

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    @contextmanager
    def about(self, key: str) -> Iterator[None]:
        """Make an error of ours inside the block a finding about ``key``."""
        try:
            yield
        except PrivateLoRAError as error:
            self.errors.append(Finding(key, " ".join(str(error).split())))

    def warn(self, key: str, message: str) -> None:
        """Note something that works and is unwise."""
        self.warnings.append(Finding(key, message))

    def check_private(self, key: str, path: Path) -> None:
        """Warn if others on this machine may read what is for its owner alone."""
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError:
            return  # whoever reads it says so
        if mode & 0o077:
            self.warn(key, f"{path} is open to other users (mode {mode:03o}); chmod 600 {path}")


def check_link(key: str, config: LinkConfig, findings: Findings, *, listens: bool) -> None:
    """Check the address in ``key`` (``listen`` or ``cloud``) and the keys that belong to it."""
    text: str = getattr(config, key)
    with findings.about(key):
        address = _parse(text, listens=listens)
        if address.scheme in (*NETWORK_SCHEMES, *_NAME_SCHEMES):
            with findings.about(_USED_KEYS.get(address.scheme, key)):
                used = _USED_KEYS.get(address.scheme)
                config.credentials().require_only(text, *([used] if used else []))
                _check_keys(address, config, listens=listens)
            if is_remote(address):
                _warn_of_strangers(key, address, config, findings)
    if config.tls is not None:
        if config.tls.key is not None:
            findings.check_private("tls.key", config.tls.key)
        _check_certificates(config.tls.certificate, config.tls.trust, findings)
    if config.curve is not None:
        findings.check_private("curve.key", config.curve.key)


def _parse(text: str, *, listens: bool) -> Address:
    address = parse_address(text)
    require_known_scheme(text)
    if address.scheme in NETWORK_SCHEMES:
        address.require_options()
        if listens:
            address.require_listen()
        else:
            address.require_contact()
    elif address.scheme in _NAME_SCHEMES:
        address.require_options()
        address.require_name()
    return address


def _check_keys(address: Address, config: LinkConfig, *, listens: bool) -> None:
    credentials = config.credentials()
    if address.scheme == "tls":
        if listens and credentials.tls is None:
            raise ConfigError(
                "tls:// needs a certificate; make one with `privatelora keys new NAME --host HOST` "
                "and set tls: certificate and key"
            )
        if credentials.tls is not None:
            make_context = server_context if listens else client_context
            make_context(credentials.tls)
    elif credentials.curve is not None:
        read = ListenerKeys.read if listens else ClientKeys.read
        read(credentials.curve)


def _warn_of_strangers(key: str, address: Address, config: LinkConfig, findings: Findings) -> None:
    """Warn of a way over a network that others can use or listen to."""
    is_open = address.scheme == "tcp" or (address.scheme == "zmq+tcp" and config.curve is None)
    if isinstance(config, CloudConfig):
        if config.open_to_all:
            findings.warn(
                "open_to_all",
                f"everybody who can reach {address} is let in{', unencrypted' if is_open else ''}; "
                "use tls:// with tls.trust or tokens, or zmq+tcp:// with curve, instead",
            )
    elif is_open:
        findings.warn(
            key,
            f"{address} is not encrypted: others on the way can read along; use tls:// or "
            "zmq+tcp:// with keys (privatelora keys new)",
        )


def _check_certificates(own: Path | None, trust: Path | None, findings: Findings) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if own is not None:
        for ends in _ends_of(own):
            if ends < now:
                with findings.about("tls.certificate"):
                    raise ConfigError(
                        f"{own} expired on {ends:%Y-%m-%d}; make another with privatelora keys new"
                    )
            elif ends < now + SOON:
                findings.warn("tls.certificate", f"{own} expires on {ends:%Y-%m-%d}")
    if trust is None:
        return
    files = [trust] if not trust.is_dir() else sorted((*trust.glob("*.crt"), *trust.glob("*.pem")))
    for file in files:
        if any(ends < now for ends in _ends_of(file)):
            findings.warn("tls.trust", f"{file} has expired: whoever shows it is not let in")


def _ends_of(path: Path) -> list[datetime.datetime]:
    """When certificates in a file expire; the first is the owner's. None if it cannot be read."""
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError):
        return []  # making a context of it says what is wrong
    return [certificate.not_valid_after_utc for certificate in certificates[:1]]
