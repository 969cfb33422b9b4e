"""What is done to a deployment, in an order that only the seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KILLS = ("kill cloud", "kill edge", "restart cloud")
"""After each of these a daemon is another process."""
ON_DAEMONS = (*KILLS, "stop cloud")
ON_SOCKETS = ("drop", "storm")
"""What a relay can do that only sees sockets come and go."""
ON_BYTES = (*ON_SOCKETS, "half-open", "stall", "truncate", "corrupt", "delay")
"""What a relay can do through which the bytes pass."""
IN_PROCESS = ("replace cloud", "drop", "worse link")

MEANINGS = {
    "kill cloud": "SIGKILL, started again at the same address",
    "kill edge": "SIGKILL, started again; its clients ask again",
    "restart cloud": "SIGTERM, which drains; started again when it has ended",
    "stop cloud": "SIGSTOP, later SIGCONT: silence while all sockets stay open",
    "drop": "every connection is reset",
    "storm": "every connection is reset, and for a while all new ones are dropped or refused",
    "half-open": "what one end sends on these connections is lost for ever, its end included",
    "stall": "nothing passes for a while, then all of it",
    "truncate": "cut off in the middle of what passes by, in order",
    "corrupt": "one to four bits flip in what passes by",
    "delay": "10 to 50 ms more each way, for a while",
    "replace cloud": "inproc: another cloud at the same address, the old one is cancelled",
    "worse link": "inproc: the next connections stall, truncate or corrupt some frames, or end",
}

MAX_PAUSE_S = 2.0
MAX_DURATION_S = 3.0
MAX_DELAY_S = 0.05


@dataclass(frozen=True)
class Fault:
    """One thing that is done.

    ``pause_s``: time that passes before it. ``duration_s``: how long it lasts, if it is a kind
    that lasts. ``upwards``: whether it meets what the edge sends, if it has a direction.
    ``refuses``: whether a storm refuses connections rather than dropping them. ``delay_s``: of a
    delay. ``seed``: of whatever else is chosen.
    """

    kind: str
    pause_s: float
    duration_s: float
    upwards: bool
    refuses: bool
    delay_s: float
    seed: int

    def __str__(self) -> str:
        details = {
            "stop cloud": f"{self.duration_s:.1f} s",
            "stall": f"{self.duration_s:.1f} s",
            "delay": f"{self.delay_s * 1e3:.0f} ms for {self.duration_s:.1f} s",
            "storm": f"{'refused' if self.refuses else 'dropped'} for {self.duration_s:.1f} s",
        }
        if self.kind in ("half-open", "truncate", "corrupt"):
            details[self.kind] = "up" if self.upwards else "down"
        detail = details.get(self.kind)
        return self.kind if detail is None else f"{self.kind} ({detail})"


def plan(seed: int, transport: str, kinds: Sequence[str]) -> Iterator[Fault]:
    """Faults without end; each kind once before any comes again."""
    chance = random.Random(f"{seed}/{transport}")
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            yield Fault(
                kind=kind,
                pause_s=chance.uniform(0.1, MAX_PAUSE_S),
                duration_s=chance.uniform(0.3, MAX_DURATION_S),
                upwards=chance.random() < 0.5,
                refuses=chance.random() < 0.5,
                delay_s=chance.uniform(0.01, MAX_DELAY_S),
                seed=chance.getrandbits(32),
            )
