"""What left this device for the cloud, for people who want to look.

Noting a message must cost next to nothing while tokens are decoded: what is shown of it is made
when somebody asks.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from privatelora.runtime.tensors import unpack
from privatelora.runtime.wire.messages import ExchangeReply, Message, StepBegin, TensorPayload

MAX_NOTED = 256
MAX_WITH_NUMBERS = 32
"""Numbers are kept of the last ones only: those of a long prompt's steps take memory."""
NUM_SHOWN = 8


@dataclass(frozen=True, slots=True)
class SentMessage:
    """One message that was sent.

    ``number``: counts all messages, from 0. ``time``: unix, in seconds. ``rows``: positions that
    it carries numbers for, ``features`` of each, written in ``codec``. ``numbers``: the first few,
    as the cloud reads them; none of older messages.
    """

    number: int
    kind: str
    time: float
    session_id: int | None
    rows: int
    features: int
    codec: str | None
    nbytes: int
    numbers: tuple[float, ...]


@dataclass(slots=True)
class _Noted:
    number: int
    kind: str
    time: float
    session_id: int | None
    shape: tuple[int, int]
    codec: str | None
    nbytes: int


class SentLog:
    """The last messages that were sent, and totals of all by kind."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[int, int]] = {}
        """Kind of message -> (messages, bytes)."""
        self._numbers = itertools.count()
        self._noted: deque[_Noted] = deque(maxlen=MAX_NOTED)
        self._payloads: deque[TensorPayload | None] = deque(maxlen=MAX_WITH_NUMBERS)

    def note(self, message: Message, nbytes: int) -> None:
        """A message of ``nbytes`` was sent."""
        kind = type(message).__name__
        messages, total = self.totals.get(kind, (0, 0))
        self.totals[kind] = messages + 1, total + nbytes
        payload = None
        if isinstance(message, ExchangeReply):
            payload = message.y
        elif isinstance(message, StepBegin):
            payload = message.hidden_states
        session_id = getattr(message, "session_id", None)
        shape, codec = ((0, 0), None) if payload is None else (payload.shape, payload.codec)
        number = next(self._numbers)
        noted = _Noted(number, kind, time.time(), session_id, shape, codec, nbytes)
        self._noted.append(noted)
        self._payloads.append(payload)

    def recent(self, after: int = -1) -> list[SentMessage]:
        """Those with a number above ``after``, oldest first; at most the last 256."""
        missing = len(self._noted) - len(self._payloads)
        payloads: Iterator[TensorPayload | None] = itertools.chain(
            itertools.repeat(None, missing), self._payloads
        )
        return [
            SentMessage(
                noted.number,
                noted.kind,
                noted.time,
                noted.session_id,
                *noted.shape,
                noted.codec,
                noted.nbytes,
                _first_numbers(payload),
            )
            for noted, payload in zip(self._noted, payloads, strict=True)
            if noted.number > after
        ]


def _first_numbers(payload: TensorPayload | None) -> tuple[float, ...]:
    if payload is None or 0 in payload.shape:
        return ()
    numbers = unpack(payload, torch.device("cpu"), torch.float32)[0, :NUM_SHOWN]
    return tuple(numbers.tolist())
