"""An edge whose cloud is hostile."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from random import Random

from tests.e2e.deployment import Deployment
from tests.e2e.processes import Process
from tests.fuzz.daemons.edges import start_edge
from tests.fuzz.daemons.hostile_cloud import HostileCloud, Trick, make_rare_trick, make_trick
from tests.fuzz.daemons.http_bytes import classify_status
from tests.fuzz.daemons.http_client import completion, fetch, good_answer
from tests.fuzz.daemons.inputs import Input, Outcome, Target, Violation
from tests.fuzz.daemons.world import DEADLINE_S, end, require_same, start_cloud
from tests.fuzz.mutations import below, pick

_PROMPTS = ("How many apples?", "She sells twenty-three.", "a", "The weather in the mountains " * 4)
_MAX_TOKENS = 4
_MAX_POSITION = 24
"""Among the frames of an answer of so many tokens, the greeting and the session before it."""
_PATIENCE_S = 0.3
_RARE = 0.02
_numbers = itertools.count()


class EdgeCloudTarget(Target):
    """Each input is a question over HTTP, while whose answer the cloud plays a trick."""

    name = "edge-cloud"
    concurrency = 1

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._running: list[Process] = []
        self._cloud: HostileCloud | None = None

    async def start(self) -> None:
        name = f"{self.name}-{next(_numbers)}"
        cloud, address = await start_cloud(self._deployment, name)
        self._running.append(cloud)
        self._hostile = self._cloud = HostileCloud(int(address.rpartition(":")[2]))
        await self._hostile.start()
        self.watched, self._port = await start_edge(
            self._deployment,
            f"tcp://127.0.0.1:{self._hostile.port}",
            f"{name}-edge",
            reconnect_timeout_s=0,
            connect_timeout_s=_PATIENCE_S,
            step_timeout_s=_PATIENCE_S,
        )
        self._running.append(self.watched)
        self.others = (cloud,)
        self._expected = await good_answer(self._port)

    async def stop(self) -> None:
        if self._cloud is not None:
            await self._cloud.stop()
            self._cloud = None
        while self._running:
            end(self._running.pop())

    def make(self, rng: Random) -> Input:
        is_new = rng.random() < 0.5
        position = below(rng, 4) if is_new and rng.random() < 0.5 else below(rng, _MAX_POSITION)
        trick = (make_rare_trick if rng.random() < _RARE else make_trick)(rng, position)
        values = {"prompt": pick(rng, _PROMPTS), "max_tokens": _MAX_TOKENS, "ignore_eos": True}
        if rng.random() < 0.3:
            values["stream"] = True
        if rng.random() < 0.2:
            values |= {"temperature": 1.0, "logprobs": 1, "echo": True}
        data = completion(values)
        return Input(f"cloud: {trick.kind}", partial(self._ask, data, trick, is_new))

    async def _ask(self, data: bytes, trick: Trick, is_new: bool) -> Outcome:
        """Ask, on a connection to the cloud that is new or has been there before."""
        if is_new:
            await self._hostile.drop()
        self._hostile.play(trick)
        try:
            async with asyncio.timeout(DEADLINE_S):
                response = await fetch(self._port, data)
        except TimeoutError as error:
            raise Violation(f"no answer in {DEADLINE_S:g} s to {data!r}") from error
        except OSError as error:
            raise Violation(f"the edge cannot be asked: {error}") from error
        finally:
            self._hostile.play(None)
        return classify_status(response.status, response.body)

    async def calm(self) -> None:
        """What the cloud said may be in the caches of both ends."""
        await self._hostile.drop()

    async def bystander(self) -> None:
        """Nobody else asks: the cloud counts the frames of one answer."""

    async def newcomer(self) -> None:
        require_same(await good_answer(self._port), self._expected)
