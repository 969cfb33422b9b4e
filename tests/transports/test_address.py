"""Addresses: what parses, what each use of one requires, and what the refusals say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.errors import ConfigError
from privatelora.transports.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp://127.0.0.1:8471", Address("tcp", "127.0.0.1", 8471)),
        ("tcp://cloud-1.example.org:1", Address("tcp", "cloud-1.example.org", 1)),
        ("tcp://[::1]:65535", Address("tcp", "::1", 65535)),
        ("tcp://[fe80::1%eth0]:80", Address("tcp", "fe80::1%eth0", 80)),
        ("tcp://*:0", Address("tcp", "*", 0)),
        ("zmq+tcp://host:5", Address("zmq+tcp", "host", 5)),
        ("zmq+ipc:///run/cloud.sock", Address("zmq+ipc", path="/run/cloud.sock")),
        ("inproc://cloud", Address("inproc", "cloud")),
        (
            "tls://h:1?ca=/a/b.pem&name=x",
            Address("tls", "h", 1, "", {"ca": "/a/b.pem", "name": "x"}),
        ),
        ("shm://name?size=", Address("shm", "name", None, "", {"size": ""})),
    ],
)
def test_parsing(text: str, expected: Address) -> None:
    parsed = parse_address(text)
    assert parsed == expected
    assert parse_address(str(parsed)) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must start with a scheme"),
        ("127.0.0.1:8471", "must start with a scheme"),
        ("://host:1", "not a scheme"),
        ("TCP://host:1", "not a scheme"),
        ("tcp://host:1 ", "white space"),
        ("tcp://ho\nst:1", "white space"),
        ("tcp://host:x", "must be a number, not 'x'"),
        ("tcp://host:", "must be a number, not ''"),
        ("tcp://host:-1", "must be a number"),
        ("tcp://host:²", "must be a number"),
        ("tcp://host:65536", "not between 0 and 65535"),
        ("tcp://host:" + "9" * 5000, "not between 0 and 65535"),
        ("tcp://::1:80", "must stand in brackets"),
        ("tcp://[::1", "must end in ']'"),
        ("tcp://[::1]80", "must end in ']'"),
        ("tcp://[127.0.0.1]:80", "not an IPv6 address"),
        ("tcp://[nonsense]:80", "not an IPv6 address"),
        ("tcp://-host:1", "not a host name"),
        ("tcp://h$st:1", "not a host name"),
        ("tcp://me:pw@host:1", "credentials"),
        ("tcp://host:1#top", "'#'"),
        ("tcp://host:1?a", "name=value"),
        ("tcp://host:1?a=1&a=2", "'a' is given twice"),
    ],
)
def test_refusals_say_what_is_wrong_and_show_an_example(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    message = str(caught.value)
    assert reason in message
    assert "for example: " in message
    assert repr(text) in message
    assert "\n" not in message


@given(st.text(alphabet="tcp:/[]*.019?=&@#ahé%-_ ", max_size=30))
def test_nothing_but_config_error_comes_out(text: str) -> None:
    try:
        parsed = parse_address("tcp://" + text)
        assert parse_address(str(parsed)) == parsed
        parsed.require_contact()
    except ConfigError:
        pass


@pytest.mark.parametrize("text", ["tcp://host:1", "tcp://[::1]:8471", "tcp://10.0.0.1:80"])
def test_contact_addresses(text: str) -> None:
    parsed = parse_address(text)
    assert parsed.require_contact() == (parsed.host, parsed.port)
    assert parsed.require_listen() == (parsed.host, parsed.port)


@pytest.mark.parametrize(
    "text", ["tcp://0.0.0.0:80", "tcp://[::]:80", "tcp://[0:0::0]:80", "tcp://*:80", "tcp://host:0"]
)
def test_addresses_for_listening_only(text: str) -> None:
    parsed = parse_address(text)
    assert parsed.require_listen() == (parsed.host, parsed.port)
    with pytest.raises(ConfigError, match=r"to connect, .* for example: tcp://"):
        parsed.require_contact()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tcp://host", "port is missing"),
        ("tcp://:80", "host is missing"),
        ("tcp://", "host is missing"),
        ("tcp://host:80/path", "unexpected path '/path'"),
    ],
)
def test_host_and_port_are_required(text: str, reason: str) -> None:
    parsed = parse_address(text)
    for require in (parsed.require_contact, parsed.require_listen):
        with pytest.raises(ConfigError, match=reason):
            require()


def test_names() -> None:
    assert parse_address("inproc://a.b-c_1").require_name() == "a.b-c_1"
    for text in ("inproc://", "inproc://a:1", "inproc://a/b", "inproc://*", "inproc://[::1]"):
        with pytest.raises(ConfigError, match="for example: inproc://some-name"):
            parse_address(text).require_name()


def test_unknown_options_are_refused() -> None:
    parsed = parse_address("tls://h:1?ca=x&colour=red")
    parsed.require_options("ca", "colour")
    with pytest.raises(ConfigError, match=r"unknown option 'colour'; tls takes ca"):
        parsed.require_options("ca")
    with pytest.raises(ConfigError, match="tls takes none"):
        parsed.require_options()
