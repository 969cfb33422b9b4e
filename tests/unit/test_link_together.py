"""Many conversations on one link: answered together, and none of them notices."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch

from privatelora.errors import ConfigError, ConnectionClosed
from privatelora.runtime.cloud_link import MAX_FRAMES_AT_ONCE, Answers
from privatelora.runtime.exchange import StepExchanges
from privatelora.runtime.generation import Context
from privatelora.runtime.split_model import SplitModel
from privatelora.runtime.wire.messages import (
    ExchangeReply,
    ExchangeRequest,
    Message,
    OpenSession,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.transports.base import Buffer, Connection, Handler, Limits
from privatelora.transports.registry import listen
from tests.unit.peers import RawCloud, raw_cloud, tensor
from tests.unit.waiting import let_run
from tests.unit.world import BOTH_BORDERS, ROOMY, World, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

ARRANGEMENTS: list[dict[str, Any]] = [
    {},
    {"every": 2},
    {"every": 4},
    BOTH_BORDERS,
]
PROMPTS = [[1, *range(10 * n, 10 * n + 9 + 4 * n)] for n in range(1, 9)]
NUM_DECODED = 6


class Watched:
    """Answers as a link does, and remembers how many requests came together."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.together: list[int] = []

    def __call__(
        self, index: int, asked: Seq[tuple[StepExchanges, TensorPayload]]
    ) -> list[TensorPayload | ConfigError]:
        self.together.append(len(asked))
        return self.answers(index, asked)


class Bunched(Connection):
    """Holds back what is sent for some turns of the loop, so that much arrives at once."""

    def __init__(self, inner: Connection) -> None:
        self.counters = inner.counters
        self._inner = inner
        self._held: list[bytes] = []
        self._sent = asyncio.Event()
        self._flushing = asyncio.create_task(self._flush())

    @property
    def peer(self) -> str:
        return self._inner.peer

    async def send(self, *parts: Buffer) -> None:
        self._held.append(b"".join(parts))
        self._sent.set()

    async def _flush(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._sent.wait()
                await let_run(20)
                self._sent.clear()
                held, self._held = self._held, []
                for frame in held:
                    await self._inner.send(frame)

    async def end(self) -> None:
        self._flushing.cancel()
        await asyncio.wait({self._flushing})

    async def recv(self) -> memoryview:
        return await self._inner.recv()

    def recv_nowait(self) -> memoryview | None:
        return self._inner.recv_nowait()

    async def aclose(self) -> None:
        await self._inner.aclose()

    def abort(self) -> None:
        self._inner.abort()


def bunching(handler: Handler) -> Handler:
    async def handle(connection: Connection) -> None:
        bunched = Bunched(connection)
        try:
            await handler(bunched)
        finally:
            await bunched.end()

    return handle


async def watch(model: SplitModel) -> Watched:
    link = await model.link()
    link._answers = watched = Watched(link._answers)
    return watched


async def converse(model: SplitModel, prompt: list[int]) -> torch.Tensor:
    """Prefill most of ``prompt``, then go on token by token; logits from there on."""
    context = await Context.open(model, len(prompt))
    start = len(prompt) - NUM_DECODED
    logits = [await context.advance(prompt[:end]) for end in range(start, len(prompt) + 1)]
    await context.aclose()
    return torch.stack(logits)


async def expectations(split: World) -> list[torch.Tensor]:
    return [(await solo(split.unsplit(), p))[-1 - NUM_DECODED :] for p in PROMPTS]


@pytest.mark.parametrize("address", ["inproc://together", "tcp://127.0.0.1:0"])
@pytest.mark.parametrize("options", ARRANGEMENTS)
async def test_each_gets_what_it_gets_alone(options: dict[str, Any], address: str) -> None:
    split = world(**options)
    expected = await expectations(split)
    handler = bunching(split.service().handle)
    async with await listen(address, handler, Limits()) as listener:
        model = split.split(listener.address, max_step_positions=8)
        watched = await watch(model)
        found = await asyncio.gather(*(converse(model, prompt) for prompt in PROMPTS))
        await model.aclose()
    for logits, alone in zip(found, expected, strict=True):
        assert_same(logits, alone)
    if split.plan.wire_points:
        assert max(watched.together) >= len(PROMPTS) // 2


@pytest.mark.parametrize("address", ["inproc://together", "tcp://127.0.0.1:0"])
async def test_some_may_come_and_go_and_be_cancelled(address: str) -> None:
    split = world(**BOTH_BORDERS)
    expected = await expectations(split)
    handler = bunching(split.service().handle)
    async with await listen(address, handler, Limits()) as listener:
        model = split.split(listener.address, max_step_positions=8)
        for seed in range(6):
            choice = random.Random(seed)
            tasks = [asyncio.create_task(converse(model, prompt)) for prompt in PROMPTS]
            given_up = choice.sample(tasks, 3)
            for task in given_up:
                await let_run(choice.randrange(40))
                task.cancel()
            await asyncio.wait(tasks)
            for task, alone in zip(tasks, expected, strict=True):
                if task not in given_up:
                    assert_same(task.result(), alone)
            await model.aclose()  # their sequences were not closed


@pytest.mark.parametrize("at", [1, 4, 11])
async def test_one_that_fails_takes_no_other_with_it(at: int) -> None:
    split = world()
    expected = await expectations(split)
    victim: list[StepExchanges] = []

    class Failing(Watched):
        def __call__(
            self, index: int, asked: Seq[tuple[StepExchanges, TensorPayload]]
        ) -> list[TensorPayload | ConfigError]:
            found = super().__call__(index, asked)
            if len(asked) > 1 and not victim and len(self.together) >= at:
                victim.append(asked[1][0])
                found[1] = ConfigError("no number fits")
            return found

    async with serving(bunching(split.service(ROOMY).handle)) as address:
        model = split.split(address, max_step_positions=64)
        link = await model.link()
        link._answers = Failing(link._answers)
        outcomes = await asyncio.gather(
            *(converse(model, prompt) for prompt in PROMPTS), return_exceptions=True
        )
        failures = [outcome for outcome in outcomes if not isinstance(outcome, torch.Tensor)]
        assert [str(failure) for failure in failures] == ["no number fits"]
        for outcome, alone in zip(outcomes, expected, strict=True):
            if isinstance(outcome, torch.Tensor):
                assert_same(outcome, alone)
        assert link.is_open
        for _ in range(2):  # the cloud has given back the room of all of them
            await asyncio.gather(*(converse(model, prompt) for prompt in PROMPTS))
        await model.aclose()


async def open_all(cloud: RawCloud, num_sessions: int) -> list[StepBegin]:
    """Open sessions and hear the first step of each."""
    for session_id in range(num_sessions):
        await cloud.hear(OpenSession)
        await cloud.say(SessionOpened(session_id, 128))
    return [await cloud.hear(StepBegin) for _ in range(num_sessions)]


async def test_answers_that_are_due_go_before_every_step_that_ended() -> None:
    heard: list[Message | None] = []
    split = world()
    point = split.plan.wire_points[0].index
    z_size = split.plan.z_size

    async def end_two_and_ask(cloud: RawCloud) -> None:
        begun = await open_all(cloud, 4)
        await cloud.say(
            StepEnd(0, begun[0].step_id, tensor(1, 64)),
            ExchangeRequest(2, begun[2].step_id, point, tensor(2, z_size)),
            StepEnd(1, begun[1].step_id, tensor(1, 64)),
            ExchangeRequest(3, begun[3].step_id, point, tensor(2, z_size)),
        )
        heard.extend([await cloud.hear(ExchangeReply) for _ in range(2)])
        heard.append(await cloud.hear(StepBegin))
        # The first that ended has had its turn; the second has to wait for this answer.
        await cloud.say(ExchangeRequest(0, 1, point, tensor(1, z_size)))
        heard.append(cloud.wire.receive(await cloud.connection.recv()))
        heard.append(cloud.wire.receive(await cloud.connection.recv()))
        await cloud.listen_on()

    async with serving(raw_cloud(end_two_and_ask)) as address:
        model = split.split(address)
        contexts = [await Context.open(model) for _ in range(4)]

        async def two_steps(context: Context) -> None:
            await context.advance([5, 6])
            await context.advance([5, 6, 7])

        tasks = [asyncio.create_task(two_steps(context)) for context in contexts]
        async with asyncio.timeout(5):
            while len(heard) < 5:  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0)
        await model.aclose()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, ConnectionClosed) for outcome in outcomes)
    shown = [(type(m).__name__, m.session_id) for m in heard if m is not None]  # type: ignore[union-attr]
    assert shown[:3] == [("ExchangeReply", 2), ("ExchangeReply", 3), ("StepBegin", 0)]
    assert sorted(shown[3:]) == [("ExchangeReply", 0), ("StepBegin", 1)]


async def test_not_more_are_answered_together_than_is_good_for_the_first() -> None:
    num_sessions = MAX_FRAMES_AT_ONCE + 5
    split = world()
    point, z_size = split.plan.wire_points[0].index, split.plan.z_size
    replies: list[int] = []

    async def ask_all(cloud: RawCloud) -> None:
        begun = await open_all(cloud, num_sessions)
        requests = [
            ExchangeRequest(begin.session_id, begin.step_id, point, tensor(1, z_size))
            for begin in begun
        ]
        await cloud.say(*requests)
        replies.extend([(await cloud.hear(ExchangeReply)).session_id for _ in begun])
        await cloud.say(*(StepEnd(n, 0, tensor(1, 64)) for n in range(num_sessions)))
        await cloud.listen_on()

    async with serving(raw_cloud(ask_all)) as address:
        model = split.split(address)
        watched = await watch(model)
        contexts = [await Context.open(model) for _ in range(num_sessions)]
        await asyncio.gather(*(context.advance([5]) for context in contexts))
        await model.aclose()
    assert replies == [*range(num_sessions)]
    assert watched.together == [MAX_FRAMES_AT_ONCE, 5]
