"""A client who floods a cloud, and one who decodes quietly beside it.

The engine runs one step at a time here, so its work is counted in batches, not by the clock. All
ends share one event loop and a transport without timers: the counts are the same in every run.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from pydantic import SecretStr

from privatelora.runtime.client_tokens import Tokens, digest
from privatelora.runtime.generation import Context
from privatelora.runtime.scheduler import Batch
from privatelora.runtime.split_model import SplitModel
from tests.unit.world import ROOMY, serving, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

QUIET, FLOOD = SecretStr("q" * 43), SecretStr("f" * 43)
CLIENTS = Tokens({digest(QUIET.get_secret_value()): "quiet", digest(FLOOD.get_secret_value()): "f"})
FLOOD_SESSIONS = 15
LENGTH = 120
NUM_TOKENS = 40
LIMITS = replace(
    ROOMY,
    max_sessions=FLOOD_SESSIONS + 1,
    max_sessions_per_client=FLOOD_SESSIONS + 1,
    max_cached_positions=(FLOOD_SESSIONS + 1) * 128,
    max_batch_rows=1,
)


class Recorder:
    """Which steps each batch had."""

    def __init__(self) -> None:
        self.batches: list[tuple[tuple[int, int], ...]] = []

    def note_batch(self, batch: Batch, started: float, ended: float) -> None:
        self.batches.append(batch.steps)

    def note_wait(self, key: tuple[int, int], point: int, started: float, ended: float) -> None:
        pass


@asynccontextmanager
async def flooding(model: SplitModel, num_decoding: int, num_prompting: int) -> AsyncIterator[None]:
    """Sessions that decode without end, and such that send one long prompt after the other."""
    num_sessions, num_done = num_decoding + num_prompting, 0
    is_under_way = asyncio.Event()

    def note_done() -> None:
        nonlocal num_done
        num_done += 1
        if num_done >= 3 * num_sessions:  # all have their place
            is_under_way.set()

    async def decode() -> None:
        context = await Context.open(model, LENGTH)
        while True:
            for end in range(3, LENGTH):
                await context.advance([*range(3, 3 + end)])
                note_done()

    async def prompt(number: int) -> None:
        for turn in itertools.count():
            context = await Context.open(model, LENGTH)
            await context.advance([3 + (number + turn + 7 * i) % 90 for i in range(LENGTH)])
            await context.aclose()
            note_done()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(decode()) for _ in range(num_decoding)]
        tasks += [group.create_task(prompt(number)) for number in range(num_prompting)]
        if tasks:
            await is_under_way.wait()
        yield
        for task in tasks:
            task.cancel()


async def batches_per_token(num_decoding: int, num_prompting: int, tokens: Tokens | None) -> float:
    """How many batches run from one token of the quiet client to the next, on average."""
    split, recorder = world(), Recorder()
    service = split.service(LIMITS, recorder, tokens)
    async with serving(service.handle) as address:
        quiet = split.split(address, token=lambda: QUIET)
        flood = split.split(address, token=lambda: FLOOD, max_step_positions=8)
        context = await Context.open(quiet, LENGTH)  # session 0
        await context.advance([1, 2])
        async with flooding(flood, num_decoding, num_prompting):
            first = len(recorder.batches)
            for end in range(3, 3 + NUM_TOKENS):
                await context.advance([1, *range(3, 2 + end)])
            batches = recorder.batches[first:]
        await quiet.aclose()
        await flood.aclose()
    num_segments = len(split.plan.wire_points) + 1
    its_own = [number for number, steps in enumerate(batches) if any(s == 0 for s, _ in steps)]
    token_ends = its_own[num_segments - 1 :: num_segments]
    assert len(token_ends) == NUM_TOKENS
    return statistics.mean(b - a for a, b in itertools.pairwise(token_ends)) / num_segments


@pytest.mark.parametrize(("num_decoding", "num_prompting"), [(15, 0), (10, 5), (0, 15)])
async def test_a_flood_leaves_the_other_client_its_half(
    num_decoding: int, num_prompting: int
) -> None:
    """Its fair share of the engine is a half, so its tokens take twice the batches."""
    assert await batches_per_token(0, 0, CLIENTS) == 1
    assert await batches_per_token(num_decoding, num_prompting, CLIENTS) < 2.5


async def test_a_flood_of_the_same_client_leaves_a_session_its_part() -> None:
    """Without tokens the two are one client, of whose 16 sessions each has an equal part."""
    assert 10 < await batches_per_token(15, 0, None) < 20
