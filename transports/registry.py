"""From the scheme of an address to the transport that serves it.

A transport is imported when its scheme is first used, so that nobody pays for, or needs, the
libraries of the others. Other packages add schemes with an entry point in the group
``privatelora.transports``: the scheme as its name, ``module:Class`` of a Transport as its
value. They cannot replace a scheme of this package.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect

from privatelora.errors import ConfigError
from privatelora.transports.address import parse_address
from privatelora.transports.base import (
    NO_CREDENTIALS,
    Connection,
    Credentials,
    Handler,
    Limits,
    Listener,
    Transport,
)

ENTRY_POINT_GROUP = "privatelora.transports"

_BUILT_IN = {
    "inproc": "privatelora.transports.inproc:InprocTransport",
    "shm": "privatelora.transports.shm:ShmTransport",
    "tcp": "privatelora.transports.tcp:TcpTransport",
    "tls": "privatelora.transports.tls:TlsTransport",
    "zmq+ipc": "privatelora.transports.zeromq:ZmqTransport",
    "zmq+tcp": "privatelora.transports.zeromq:ZmqTransport",
}
_DEFAULT_LIMITS = Limits()


async def connect(
    address: str,
    limits: Limits = _DEFAULT_LIMITS,
    credentials: Credentials = NO_CREDENTIALS,
) -> Connection:
    """Open a connection to a contact address.

    Raises ConfigError (the address cannot work), ConnectError, TransportTimeout or AuthError.
    """
    return await _transport(address).connect(address, limits, credentials)


async def listen(
    address: str,
    handler: Handler,
    limits: Limits = _DEFAULT_LIMITS,
    credentials: Credentials = NO_CREDENTIALS,
) -> Listener:
    """Listen on an address and run ``handler`` for each connection.

    Raises ConfigError or ConnectError (address in use, not permitted).
    """
    return await _transport(address).listen(address, handler, limits, credentials)


def require_known_scheme(address: str) -> None:
    """Raise ConfigError if no transport serves such addresses, or too many do."""
    _find(parse_address(address).scheme)


def known_schemes() -> list[str]:
    """Every scheme that can be used here, sorted."""
    return sorted({*_BUILT_IN, *importlib.metadata.entry_points(group=ENTRY_POINT_GROUP).names})


def _transport(address: str) -> Transport:
    return _load(parse_address(address).scheme)


@functools.cache
def _load(scheme: str) -> Transport:
    entry_point = _find(scheme)
    try:
        loaded = entry_point.load()
    except Exception as error:  # whatever the import of another package's module raises
        raise ConfigError(
            f"the transport {scheme}:// ({entry_point.value}) cannot be loaded: {error}; "
            "install what it needs or use another scheme"
        ) from error
    is_transport = isinstance(loaded, type) and issubclass(loaded, Transport)
    if not is_transport or inspect.isabstract(loaded):
        raise ConfigError(
            f"the transport {scheme}:// ({entry_point.value}) is not a complete subclass of "
            "privatelora.transports.base.Transport; report this to the package that provides it"
        )
    transport: Transport = loaded()
    return transport


def _find(scheme: str) -> importlib.metadata.EntryPoint:
    if scheme in _BUILT_IN:
        return importlib.metadata.EntryPoint(scheme, _BUILT_IN[scheme], ENTRY_POINT_GROUP)
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=scheme)
    providers = sorted({entry_point.value for entry_point in found})
    if not providers:
        raise ConfigError(
            f"no transport serves {scheme}://; known schemes: {', '.join(known_schemes())}"
        )
    if len(providers) > 1:
        raise ConfigError(
            f"{scheme}:// is provided more than once ({', '.join(providers)}); "
            "uninstall all packages but one of these"
        )
    return next(iter(found))
