"""Making certificates."""

from __future__ import annotations

import datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509 import DNSName, IPAddress, SubjectAlternativeName

from privatelora.errors import ConfigError
from privatelora.transports.tls_keys import new_certificate


def make(folder: Path, hosts: tuple[str, ...] = (), days: int = 30) -> x509.Certificate:
    new_certificate(folder / "a.key", folder / "a.crt", "alice", hosts, days)
    return x509.load_pem_x509_certificate((folder / "a.crt").read_bytes())


def test_what_a_certificate_says(tmp_path: Path) -> None:
    hosts = ("cloud.example", "my_cloud", "192.0.2.7", "2001:db8::7", "fe80::1%eth0")
    certificate = make(tmp_path, hosts)
    names = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
    assert names.get_values_for_type(DNSName) == ["cloud.example", "my_cloud"]
    assert names.get_values_for_type(IPAddress) == [
        ip_address(ip) for ip in ("192.0.2.7", "2001:db8::7", "fe80::1")
    ]
    assert certificate.subject.rfc4514_string() == "CN=alice"
    now = datetime.datetime.now(datetime.UTC)
    assert abs(certificate.not_valid_after_utc - now - datetime.timedelta(days=30)) < (
        datetime.timedelta(minutes=5)
    )
    assert certificate.not_valid_before_utc < now
    certificate.verify_directly_issued_by(certificate)


def test_it_is_no_authority(tmp_path: Path) -> None:
    extensions = make(tmp_path).extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_who_can_read_the_files(tmp_path: Path) -> None:
    make(tmp_path)
    assert (tmp_path / "a.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a.crt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["a.key", "a.crt"])
def test_nothing_is_overwritten_and_nothing_left(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=rf"{name} exists; choose another name"):
        make(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere/a\.key: no such file"):
        make(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "host", ["", "tls://cloud", "cloud:1", "[::1]", "*.example", "münchen", ".a", "a..b", "a b"]
)
def test_what_is_no_host(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="is not a host: give a name such as"):
        make(tmp_path, (host,))
    assert list(tmp_path.iterdir()) == []
