"""Schemes: the built-in ones, those of other packages, and what is said of the rest."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from typing import ClassVar

import pytest

from privatelora.errors import ConfigError, ConnectError
from privatelora.transports.base import (
    Connection,
    Credentials,
    Handler,
    Limits,
    Listener,
    Transport,
)
from privatelora.transports.registry import connect, known_schemes, listen

Install = Callable[..., None]


class RecordingTransport(Transport):
    """Notes what it was called with."""

    calls: ClassVar[list[tuple[object, ...]]] = []

    async def connect(self, address: str, limits: Limits, credentials: Credentials) -> Connection:
        self.calls.append(("connect", address, limits, credentials))
        raise ConnectError("out of pigeons")

    async def listen(
        self, address: str, handler: Handler, limits: Limits, credentials: Credentials
    ) -> Listener:
        self.calls.append(("listen", address, handler, limits, credentials))
        raise ConnectError("out of pigeons")


not_a_transport = object()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretends that other packages provide ``scheme="module:Class"`` entry points."""

    def install(*pairs: tuple[str, str]) -> None:
        group = "privatelora.transports"
        points = EntryPoints(EntryPoint(scheme, value, group) for scheme, value in pairs)
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda **params: points.select(**params)
        )

    return install


async def handler(connection: Connection) -> None:
    raise NotImplementedError


async def test_third_party_transport(install: Install) -> None:
    install(("pigeon", f"{__name__}:RecordingTransport"))
    limits = Limits(max_frame_nbytes=10)
    RecordingTransport.calls.clear()
    with pytest.raises(ConnectError, match="pigeons"):
        await connect("pigeon://loft", limits)
    with pytest.raises(ConnectError, match="pigeons"):
        await listen("pigeon://loft", handler)
    assert RecordingTransport.calls == [
        ("connect", "pigeon://loft", limits, Credentials()),
        ("listen", "pigeon://loft", handler, Limits(), Credentials()),
    ]
    assert "pigeon" in known_schemes()
    assert known_schemes() == sorted(known_schemes())


async def test_unknown_scheme_lists_the_known_ones(install: Install) -> None:
    install(("pigeon", f"{__name__}:RecordingTransport"))
    with pytest.raises(ConfigError, match=r"no transport serves smoke://.* inproc, pigeon, .*tcp"):
        await connect("smoke://hill")
    with pytest.raises(ConfigError, match="smoke"):
        await listen("smoke://hill", handler)


async def test_built_in_schemes_cannot_be_replaced(install: Install) -> None:
    install(("inproc", f"{__name__}:RecordingTransport"))
    async with await listen("inproc://registry", handler) as listener:
        assert listener.address == "inproc://registry"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("privatelora_no_such_module:Thing", "cannot be loaded: No module named"),
        (f"{__name__}:NoSuchClass", "cannot be loaded: .*NoSuchClass"),
        (f"{__name__}:not_a_transport", "not a complete subclass"),
        (f"{__name__}:Limits", "not a complete subclass"),
        (f"{__name__}:Transport", "not a complete subclass"),
    ],
)
async def test_broken_entry_points(install: Install, value: str, reason: str) -> None:
    install(("broken", value))
    with pytest.raises(ConfigError, match=f"broken://.*{reason}"):
        await connect("broken://x")


async def test_two_packages_with_one_scheme(install: Install) -> None:
    install(("twin", f"{__name__}:RecordingTransport"), ("twin", "other.package:Transport"))
    with pytest.raises(ConfigError, match="more than once"):
        await connect("twin://x")


async def test_malformed_address() -> None:
    with pytest.raises(ConfigError, match="must start with a scheme"):
        await connect("localhost:8471")


def test_transports_are_imported_when_first_used() -> None:
    code = (
        "import sys, privatelora.transports.registry as registry; registry.known_schemes();"
        "package = 'privatelora.transports.';"
        "assert not {package + 'tcp', package + 'inproc'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
