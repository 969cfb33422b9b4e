"""One end of a connection driven message by message, to say what the real end never would."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import torch

from privatelora.errors import ConnectionClosed
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.wire.messages import (
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    Hello,
    Message,
    OpenSession,
    OutputRows,
    Role,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.runtime.wire.state import WireConnection
from privatelora.transports.base import Connection, Handler, Limits
from privatelora.transports.registry import connect
from tests.unit.world import CPU, PRINTS, World

M = TypeVar("M")


def tensor(rows: int, features: int, codec: str = "fp32") -> TensorPayload:
    return pack(torch.zeros(rows, features), codec)


class RawPeer:
    """Either end of a connection."""

    def __init__(self, role: Role, connection: Connection) -> None:
        self.connection = connection
        self.wire = WireConnection(role, WireLimits())

    async def say(self, *messages: Message) -> None:
        for message in messages:
            await self.connection.send(*self.wire.send(message))

    async def hear(self, kind: type[M]) -> M:
        """The next message, which has to be a ``kind``."""
        message = self.wire.receive(await self.connection.recv())
        assert isinstance(message, kind), message
        return message

    async def hear_error(self) -> ErrorReply:
        """The next ErrorReply, whatever comes before it."""
        while True:
            message = self.wire.receive(await self.connection.recv())
            if isinstance(message, ErrorReply):
                return message

    async def listen_on(self) -> None:
        """Take in what the peer still says, until it has gone."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self.connection.recv()


class RawEdge(RawPeer):
    """An edge of ``world`` that has greeted; it answers exchanges only when told to."""

    def __init__(self, world: World, connection: Connection) -> None:
        super().__init__(Role.EDGE, connection)
        self.world = world
        self._matrices = world.matrices()

    async def open(
        self, session_id: int, max_positions: int = 64, resume: str | None = None
    ) -> SessionOpened:
        await self.say(OpenSession(session_id, max_positions, "fp32", "fp32", resume))
        return await self.hear(SessionOpened)

    async def run(self, session_id: int, step_id: int, position: int, tokens: list[int]) -> StepEnd:
        """Run a step to its end."""
        await self.say(self.begin(session_id, step_id, position, tokens))
        while isinstance(message := await self.hear(object), ExchangeRequest):
            await self.say(self.answer(message))
        assert isinstance(message, StepEnd), message
        return message

    def begin(self, session_id: int, step_id: int, position: int, tokens: list[int]) -> StepBegin:
        """The step as it should be, for plans whose first exchange point is folded."""
        plan, point = self.world.plan, self.world.plan.folded_point
        assert point is not None
        assert plan.opening_layers == point.layers
        hidden_states = self.world.ends().embed(tokens)
        engine = self.world.engine()
        step = engine.begin(hidden_states, 0, engine.new_cache(len(tokens)))
        assert engine.advance(step) == point
        assert step.z is not None
        opening = self._matrices.reply(point, step.z)
        return StepBegin(
            session_id,
            step_id,
            position,
            OutputRows.ALL,
            pack(hidden_states, "fp32"),
            pack(opening, "fp32"),
        )

    def answer(self, request: ExchangeRequest) -> ExchangeReply:
        point = self.world.plan.points[request.point]
        y = self._matrices.reply(point, unpack(request.z, CPU, torch.float32))
        return ExchangeReply(request.session_id, request.step_id, request.point, pack(y, "fp32"))

    def logits(self, hidden_states: TensorPayload) -> torch.Tensor:
        return self.world.ends().logits(unpack(hidden_states, CPU, torch.float32))


@asynccontextmanager
async def raw_edge(world: World, address: str, token: str | None = None) -> AsyncIterator[RawEdge]:
    """Connect and greet."""
    async with await connect(address, Limits()) as connection:
        edge = RawEdge(world, connection)
        await edge.say(Hello(Role.EDGE, "raw edge", PRINTS, CODEC_NAMES, 2**20, token=token))
        await edge.hear(Hello)
        yield edge


class RawCloud(RawPeer):
    """A cloud that says what the test tells it to."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(Role.CLOUD, connection)


def raw_cloud(script: Callable[[RawCloud], Coroutine[Any, Any, None]]) -> Handler:
    """A handler that greets and then follows ``script``."""

    async def handle(connection: Connection) -> None:
        cloud = RawCloud(connection)
        await cloud.hear(Hello)
        await cloud.say(Hello(Role.CLOUD, "raw cloud", PRINTS, CODEC_NAMES, 2**20, 128, 8))
        await script(cloud)

    return handle
