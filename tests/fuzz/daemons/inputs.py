"""What a fuzzer sends, and how it may end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from enum import StrEnum
from random import Random
from typing import NamedTuple

from tests.e2e.processes import Process


class Outcome(StrEnum):
    """What became of one input."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """With an error that says why."""
    CLOSED = "closed"
    """Without a word."""
    TIMED_OUT = "timed out"
    """The daemon waits for more; the fuzzer closes."""


class Violation(Exception):
    """Something that must not happen."""


class Input(NamedTuple):
    """One thing to send. ``send`` ends when the daemon has let go of it; may raise Violation."""

    kind: str
    send: Callable[[], Awaitable[Outcome]]


class Target(ABC):
    """A daemon that is fuzzed; its programs run while its context lasts."""

    name: str
    concurrency = 16
    """Inputs at a time."""
    watched: Process
    """The program whose memory, descriptors and threads are looked at."""
    others: tuple[Process, ...] = ()
    """Programs that have to go on as well."""

    @abstractmethod
    async def start(self) -> None:
        """Start the programs; ask what an undisturbed client is answered."""

    @abstractmethod
    async def stop(self) -> None:
        """End what was started. May be called whatever became of it."""

    @abstractmethod
    def make(self, rng: Random) -> Input:
        """An input, of nothing but what ``rng`` says."""

    @abstractmethod
    async def bystander(self) -> None:
        """A client that behaves well asks while inputs are sent. Raises Violation."""

    @abstractmethod
    async def newcomer(self) -> None:
        """A client that was not there before asks. Raises Violation."""

    async def calm(self) -> None:  # noqa: B027  # most targets have nothing to do
        """Called when a batch of inputs has ended, before anybody looks at the programs."""
