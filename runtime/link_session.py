"""One session on the edge's link: what was asked of the cloud and has not ended yet."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from privatelora.errors import (
    CapacityError,
    ConnectionClosed,
    PrivateLoRAError,
    RemoteProtocolError,
)
from privatelora.runtime.exchange import StepExchanges
from privatelora.runtime.language_model import Traffic
from privatelora.runtime.wire.messages import (
    Message,
    OpenSession,
    OutputRows,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.transports.flow import again, wake

_OPENING = -1
"""Where a step's id would be, while the session is being opened."""

Ending = SessionOpened | StepEnd
"""What the cloud ends with what was asked of it."""


class SessionLink(Protocol):
    """What a session needs of the link it is on."""

    def require_open(self) -> None:
        """Raise what the link has failed with, if it has."""

    def send(self, message: Message) -> int:
        """Send a message and return its bytes. Raises LocalProtocolError."""

    def deadline(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Bound a wait for the cloud; past it the link fails with TransportTimeout."""

    def close_session(self, session: LinkSession) -> None:
        """Free a session; steps in flight are dropped. May be repeated, never raises."""


class LinkStep:
    """A step in flight, from when it is sent to its end, whether somebody waits for that or not.

    Opening a session is one too, without exchanges.
    """

    __slots__ = ("end", "exchanges")

    def __init__(self, exchanges: StepExchanges) -> None:
        self.exchanges = exchanges
        self.end: asyncio.Future[Ending | PrivateLoRAError]
        self.end = asyncio.get_running_loop().create_future()


class LinkSession:
    """One session on a link. Made by ``CloudLink.open_session``."""

    def __init__(self, link: SessionLink, session_id: int) -> None:
        self.session_id = session_id
        self.traffic = Traffic()
        self.in_flight: dict[int, LinkStep] = {}
        """What was asked and has not ended, by step id, oldest first."""
        self.failure: PrivateLoRAError | None = None
        """Why the session is over."""
        self.num_positions = 0
        """That its cache held when it was opened."""
        self.resume_token: str | None = None
        """With which another session can go on with that cache, on another connection."""
        self._link = link
        self._last_step_id = -1
        self._settling: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether it can be stepped still."""
        return self.failure is None

    async def open(self, message: OpenSession) -> None:
        """Open the session on the cloud."""
        opening = LinkStep(StepExchanges(None, 0, ""))
        async with self._link.deadline():
            self._ask(_OPENING, message, opening)
            opened = await self._outcome(opening)
        if not isinstance(opened, SessionOpened):
            raise RemoteProtocolError(f"the cloud opened a session with {opened!r}")
        self.num_positions, self.resume_token = opened.num_positions, opened.resume

    def begin(
        self,
        position: int,
        output_rows: OutputRows,
        hidden_states: TensorPayload,
        opening: TensorPayload | None,
        exchanges: StepExchanges,
    ) -> LinkStep:
        """Send a step, whose exchanges are answered from now on; ``end`` waits for its end.

        Steps may be in flight together, each at the position where the one before it ends.
        """
        self._last_step_id = step_id = self._last_step_id + 1
        step = LinkStep(exchanges)
        begin = StepBegin(self.session_id, step_id, position, output_rows, hidden_states, opening)
        self._ask(step_id, begin, step)
        return step

    async def end(self, step: LinkStep) -> TensorPayload:
        """Wait for the end of a step; the final hidden states of the rows asked for.

        After a step that nobody waited for to its end, ``settle`` before the next.
        """
        async with self._link.deadline():
            reply = await self._outcome(step)
        if not isinstance(reply, StepEnd):
            raise RemoteProtocolError(f"the cloud ended a step with {reply!r}")
        return reply.hidden_states

    async def settle(self) -> None:
        """Wait for the end of steps whose callers have gone, if there are any."""
        while self.in_flight:
            self._settling = asyncio.get_running_loop().create_future()
            async with self._link.deadline():
                await self._settling
            if self.failure is not None:
                raise again(self.failure)

    async def aclose(self) -> None:
        """Free the session. May be repeated, never raises."""
        self._link.close_session(self)

    def resolve(self, message: Ending) -> None:
        """Hand what has ended to whoever waits for it."""
        step_id = message.step_id if isinstance(message, StepEnd) else _OPENING
        if (step := self.in_flight.pop(step_id, None)) is not None:
            self._finish(step, message)

    def fail(self, error: PrivateLoRAError) -> None:
        """End the session: raise ``error`` in whoever waits."""
        self.failure = self.failure or error
        steps = list(self.in_flight.values())
        self.in_flight.clear()
        for step in steps:
            self._finish(step, error)

    def _ask(self, step_id: int, message: Message, step: LinkStep) -> None:
        self._link.require_open()
        if isinstance(self.failure, CapacityError):
            raise again(self.failure)  # which the caller can mend, or try again
        if self.failure is not None:
            raise ConnectionClosed(f"the sequence has ended: {self.failure}")
        self.in_flight[step_id] = step  # now, for the cloud may answer before the send returns
        try:
            self.traffic.sent_nbytes += self._link.send(message)
        except PrivateLoRAError:
            self.in_flight.pop(step_id, None)  # it was not said, so nothing will end it
            raise

    async def _outcome(self, step: LinkStep) -> Ending:
        outcome = await step.end
        if isinstance(outcome, PrivateLoRAError):
            raise again(outcome)
        return outcome

    def _finish(self, step: LinkStep, outcome: Ending | PrivateLoRAError) -> None:
        if not step.end.done():  # cancelled with the caller who waited for it
            step.end.set_result(outcome)
        wake(self._settling)
