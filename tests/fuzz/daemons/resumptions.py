"""A session that is gone on with on another connection, rightly or not."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from random import Random

from privatelora.errors import ConnectionClosed, PrivateLoRAError
from privatelora.runtime.wire.messages import OpenSession, OutputRows, SessionOpened, StepBegin
from privatelora.transports.base import Connection
from tests.fuzz.daemons.conversation import GOODBYE, Conversation, to_frame
from tests.fuzz.daemons.frames import Connect, Listener, TurnedAwayError
from tests.fuzz.daemons.inputs import Input, Outcome, Violation
from tests.fuzz.daemons.pipes import END_DEADLINE_S, WAIT_S
from tests.fuzz.mutations import below, pick

_OPENING = 2
"""Turns after which the first session is open."""


class Resumptions:
    """Makes inputs of two connections, the second of which asks for the session of the first."""

    def __init__(self, connect: Connect, conversations: Sequence[Conversation]) -> None:
        self._connect = connect
        self._conversations = conversations

    def make(self, rng: Random) -> Input:
        conversation = pick(rng, self._conversations)
        resumption = _Resumption(
            conversation,
            num_turns=_OPENING + below(rng, len(conversation) - _OPENING),
            stays=rng.random() < 0.3,
            token=pick(rng, (None, None, None, "x", "A" * 43)),
            num_more=pick(rng, (0, 0, 0, 0, -1, 1, 1000)),
            shift=pick(rng, (0, 0, 0, -1, -3, 1, 60)),
        )
        return Input("connection: resumed", lambda: resumption.run(self._connect))


@dataclasses.dataclass
class _Resumption:
    """``num_turns``: before the first connection is lost, or not even that if it ``stays``.

    ``token``: in place of the right one. ``num_more``: positions asked for beyond those of before.
    ``shift``: where the next step begins, from where it should.
    """

    conversation: Conversation
    num_turns: int
    stays: bool
    token: str | None
    num_more: int
    shift: int

    async def run(self, connect: Connect) -> Outcome:
        connections: list[Connection] = []
        try:
            async with asyncio.timeout(END_DEADLINE_S):
                with suppress(ConnectionClosed):
                    first = await connect()
                    connections.append(first)
                    token = await self._begin(first)
                    if not self.stays:
                        first.abort()
                    second = await connect()
                    connections.append(second)
                    return await self._go_on(second, token)
        except TimeoutError as error:
            raise Violation(f"a session did not end in {END_DEADLINE_S:g} s") from error
        except (PrivateLoRAError, TurnedAwayError):
            return Outcome.REFUSED
        finally:
            for connection in connections:
                connection.abort()
        return Outcome.CLOSED

    async def _begin(self, connection: Connection) -> str | None:
        listener = Listener(connection)
        token = None
        for turn in self.conversation[: self.num_turns]:
            for frame in turn.frames:
                await connection.send(frame)
            for _ in range(turn.num_answers):
                message = await listener.hear_answer()
                if isinstance(message, SessionOpened):
                    token = token or message.resume
        return token

    async def _go_on(self, connection: Connection, token: str | None) -> Outcome:
        listener = Listener(connection)
        [hello], [opening] = (turn.messages for turn in self.conversation[:_OPENING])
        assert isinstance(opening, OpenSession)
        await connection.send(to_frame(hello))
        await listener.hear_answer()
        again = dataclasses.replace(
            opening,
            resume=self.token or token,
            max_positions=opening.max_positions + self.num_more,
        )
        await connection.send(to_frame(again))
        answer = await listener.hear()
        if isinstance(answer, SessionOpened):
            step = dataclasses.replace(
                self._one_row(), step_id=0, position=max(answer.num_positions + self.shift, 0)
            )
            await connection.send(to_frame(step))
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await listener.hear()
        await connection.send(to_frame(GOODBYE))
        await listener.to_the_end()
        return listener.outcome

    def _one_row(self) -> StepBegin:
        messages = (message for turn in self.conversation for message in turn.messages)
        return next(
            message
            for message in messages
            if isinstance(message, StepBegin) and message.output_rows is OutputRows.LAST
        )
