"""How many connections a cloud has, and who has to go when there are too many."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from privatelora.errors import CapacityError


class Caller(Protocol):
    """One end of a connection."""

    def drop(self, reason: str) -> None:
        """End the connection at once."""


class ConnectionLimits:
    """Those connected now: strangers, who have not said who they are, and clients.

    Strangers cost little and can be had by anybody in any number, so the one who has been one for
    longest goes when there is no room for another: whoever means it says so at once.
    """

    def __init__(self, max_connections: int, max_per_client: int) -> None:
        """``max_connections``: of clients; a quarter as many strangers come on top."""
        self._max_connections = max_connections
        self._max_per_client = max_per_client
        self._max_strangers = max(1, max_connections // 4)
        self._strangers: dict[Caller, None] = {}
        """Longest first."""
        self._clients: dict[Caller, str] = {}
        self._counts: Counter[str] = Counter()

    @property
    def num_clients(self) -> int:
        """Connections of those who have said who they are."""
        return len(self._clients)

    def arrive(self, caller: Caller) -> None:
        """Somebody has connected."""
        if len(self._strangers) >= self._max_strangers:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.drop("too many connect and say nothing")
        self._strangers[caller] = None

    def admit(self, caller: Caller, client: str) -> None:
        """A stranger has turned out to be ``client``. Raises CapacityError at a limit."""
        self._strangers.pop(caller, None)
        if len(self._clients) >= self._max_connections:
            raise CapacityError(
                f"this cloud has {self._max_connections} connections already; try again later"
            )
        if self._counts[client] >= self._max_per_client:
            raise CapacityError(
                f"{client} has {self._max_per_client} connections already; close one first"
            )
        self._clients[caller] = client
        self._counts[client] += 1

    def leave(self, caller: Caller) -> None:
        """A connection is over."""
        self._strangers.pop(caller, None)
        client = self._clients.pop(caller, None)
        if client is not None:
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]
