"""What came of a transport's part of a chaos run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_RECENT_FAULTS = 8
MAX_LOGS = 5


@dataclass
class Failure:
    """Something that must not happen. ``at_s``: since the run of this transport began."""

    what: str
    at_s: float
    faults: list[str]
    """The last ones before it, with their times."""
    logs: dict[str, list[str]]
    """The last lines of each daemon's log."""


@dataclass
class Growth:
    """Of one daemon, over a lifetime; see ``growth.measured``."""

    lifetime_s: float
    memory_mib: float
    descriptors: float
    threads: float
    others: dict[str, float] = field(default_factory=dict)
    """Sessions of a cloud, tasks of the event loop in the process that has both ends."""


@dataclass
class Outcome:
    """Of one transport."""

    transport: str
    seed: int
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    """How many of each kind."""
    equal: int = 0
    different: int = 0
    lost: int = 0
    hung: int = 0
    asked_again: int = 0
    tokens: int = 0
    """Of the answers that were equal."""
    longest_pause_s: float = 0.0
    """Between two pieces of an answer, or before the first."""
    growth: dict[str, Growth] = field(default_factory=dict)
    """By daemon, over its longest lifetime."""
    failures: list[Failure] = field(default_factory=list)

    @property
    def finished(self) -> int:
        """Generations that came to their end."""
        return self.equal + self.different

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {**asdict(self), "finished": self.finished}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Outcome:
        """What ``as_json`` gave."""
        value = {name: value[name] for name in value if name != "finished"}
        value["failures"] = [Failure(**failure) for failure in value["failures"]]
        value["growth"] = {name: Growth(**growth) for name, growth in value["growth"].items()}
        return cls(**value)


class Record:
    """Where everything that happens to one transport is noted."""

    def __init__(self, transport: str, seed: int) -> None:
        self.outcome = Outcome(transport, seed)
        self._started = time.monotonic()
        self._recent: list[str] = []

    @property
    def now_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def fault(self, kind: str, text: str) -> None:
        """A fault begins."""
        self.outcome.faults[kind] = self.outcome.faults.get(kind, 0) + 1
        self._recent = [*self._recent, f"{self.now_s:.1f} s {text}"][-MAX_RECENT_FAULTS:]

    def failure(self, what: str, logs: dict[str, list[str]]) -> None:
        """Something went wrong that must not. ``logs`` are kept for the first failures only."""
        failures = self.outcome.failures
        if len(failures) >= MAX_LOGS:
            logs = {}
        failures.append(Failure(what, round(self.now_s, 2), [*self._recent], logs))
