"""Certificates that ``privatelora keys new`` would not make: of authorities, expired, ..."""

from __future__ import annotations

import datetime
import ipaddress
import itertools

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.transports.tls_keyrings import Identity, keys_folder

_numbers = itertools.count()


def issue(
    issuer: Identity | None = None,
    *,
    days: tuple[int, int] = (-1, 1),
    is_authority: bool = False,
    chain: tuple[Identity, ...] = (),
) -> Identity:
    """A certificate for 127.0.0.1, signed by ``issuer`` or itself, valid between two days."""
    number = next(_numbers)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"issued {number}")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(_name(issuer) if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(_key(issuer) if issuer else key, hashes.SHA256())
    )
    issued = Identity(
        keys_folder() / f"issued-{number}.crt", keys_folder() / f"issued-{number}.key"
    )
    issued.certificate.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + b"".join(link.certificate.read_bytes() for link in chain)
    )
    issued.key.touch(0o600)
    issued.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return issued


def _name(issuer: Identity) -> x509.Name:
    return x509.load_pem_x509_certificate(issuer.certificate.read_bytes()).subject


def _key(issuer: Identity) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(issuer.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key
