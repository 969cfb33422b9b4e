"""Making private keys and self-signed certificates for ``tls://``."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privatelora.errors import ConfigError

MAX_DAYS = 3650

_MAX_NAME_LENGTH = 64  # of a common name, X.520
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
_CLOCK_TOLERANCE = datetime.timedelta(hours=1)


def new_certificate(
    key: Path, certificate: Path, name: str, hosts: Sequence[str], days: int
) -> None:
    """Make a P-256 private key and a certificate for it, signed with itself; two PEM files.

    ``name``: whose it is, for people. ``hosts``: names and IPs under which a listener with this
    certificate is reached; a client's may have none. ``days``: until it expires. The
    certificate serves on either end, and in a peer's ``trust``, where it vouches for itself
    only. The key is readable by its owner alone. Raises ConfigError; nothing is overwritten, and
    after an error neither file is left.
    """
    if not 1 <= len(name) <= _MAX_NAME_LENGTH:
        raise ConfigError(f"the name {name!r} must have 1 to {_MAX_NAME_LENGTH} characters")
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"a certificate can be valid for 1 to {MAX_DAYS} days, not {days}")
    private_key = ec.generate_private_key(ec.SECP256R1())
    signed = _signed(private_key, name, [_general_name(host) for host in hosts], days)
    _create(
        key,
        0o600,
        private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    try:
        _create(certificate, 0o644, signed.public_bytes(serialization.Encoding.PEM))
    except BaseException:
        key.unlink()
        raise


def _signed(
    key: ec.EllipticCurvePrivateKey, name: str, hosts: Sequence[x509.GeneralName], days: int
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_TOLERANCE)
        .not_valid_after(now + datetime.timedelta(days=days))
        # Not an authority: whoever trusts it must not trust what its key could sign.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_signatures_only(), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(key_id, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), critical=False
        )
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return builder.sign(key, hashes.SHA256())


def _signatures_only() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        if not _HOST_NAME.fullmatch(host):
            raise ConfigError(
                f"{host!r} is not a host: give a name such as cloud.example or an IP such as "
                "192.0.2.7 or 2001:db8::7, without scheme, brackets and port"
            ) from None
        return x509.DNSName(host)
    if ip.is_unspecified:
        raise ConfigError(
            f"{host} means every interface; give the names and IPs that peers dial instead"
        )
    if isinstance(ip, ipaddress.IPv6Address) and ip.scope_id is not None:
        ip = ipaddress.IPv6Address(int(ip))
    return x509.IPAddress(ip)


def _create(path: Path, mode: int, content: bytes) -> None:
    """Write a new file that has ``mode`` from the start, whatever the umask allows."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists; choose another name, or move it away first") from error
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # a strict umask may have taken bits away
            file.write(content)
    except OSError as error:
        path.unlink()
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write {path}: {(error.strerror or str(error)).lower()}")
