"""Caches of sessions whose connection was lost, kept for a while in case their edge comes back.

They are worth less than any session: what somebody needs is taken from them first, the oldest
first. Their tokens are kept as digests, as those of clients are, and each works once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass

from privatelora.runtime.client_tokens import digest
from privatelora.runtime.kv_cache import KVCache


def new_resume_token() -> str:
    """A token that nobody can guess: 256 random bits."""
    return secrets.token_urlsafe(32)


@dataclass(frozen=True)
class Detached:
    """What is left of a session: whose it was and what its cache holds, ``num_positions``."""

    client: str
    kv: KVCache
    num_positions: int


class DetachedCaches:
    """Keeps caches by the digests of their tokens, each for ``keep_s`` at most."""

    def __init__(self, keep_s: float, max_per_client: int) -> None:
        self._keep_s = keep_s
        self._max_per_client = max_per_client
        self._kept: OrderedDict[str, tuple[Detached, asyncio.TimerHandle]] = OrderedDict()
        """Those kept for longest first."""

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, token_digest: str, detached: Detached) -> None:
        """Keep one more, and of its client no more than are allowed."""
        own = [key for key, (other, _) in self._kept.items() if other.client == detached.client]
        if len(own) >= self._max_per_client:
            self._free(own[0])
        timer = asyncio.get_running_loop().call_later(self._keep_s, self._free, token_digest)
        self._kept[token_digest] = detached, timer

    def take(self, token: str, client: str) -> Detached | None:
        """The one with this token, if there is one and it is ``client``'s."""
        key = digest(token)
        if key not in self._kept or self._kept[key][0].client != client:
            return None
        detached, timer = self._kept.pop(key)
        timer.cancel()
        return detached

    def free_oldest(self) -> bool:
        """Give the memory of the oldest back; False if there is none."""
        if self._kept:
            self._free(next(iter(self._kept)))
            return True
        return False

    def _free(self, key: str) -> None:
        detached, timer = self._kept.pop(key)
        timer.cancel()
        detached.kv.release()
