"""Fixtures: every test on both event loops, the case at hand, connected pairs, leak checks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import pytest
import uvloop

from privatelora.transports.base import Connection, Limits
from privatelora.transports.emulated_link import Impairment
from privatelora.transports.registry import listen
from tests.transports.cases import CASES, Case
from tests.transports.impaired_rig import LIMITS, NOTHING, MakeRig, Rig
from tests.transports.support import SMALL_QUEUE


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def _open_descriptors() -> Counter[str]:
    """How many descriptors of each kind are open (uvloop renews its own at every run)."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            found[os.readlink(f"/proc/self/fd/{fd}").partition(":[")[0]] += 1
    return found


@pytest.fixture
async def nothing_leaks() -> AsyncIterator[None]:
    """Fail the test if it leaves a task or a file descriptor behind."""
    descriptors, tasks = _open_descriptors(), asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - tasks - {asyncio.current_task()}
    assert not left
    assert _open_descriptors() == descriptors


@pytest.fixture
async def ends_in_time() -> AsyncIterator[None]:
    """Cancel a test that hangs: the alarm signal of pytest-timeout does not get past uvloop."""

    def give_up() -> None:
        for task in asyncio.all_tasks():
            task.cancel("the test hangs")

    timer = asyncio.get_running_loop().call_later(30, give_up)
    yield
    timer.cancel()


@pytest.fixture
def own_errors(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, which must not show failed callbacks or tasks of the event loop."""
    yield caplog
    assert [record for record in caplog.records if record.name == "asyncio"] == []


DEFAULT_LIMITS = Limits()


class OpenPair(Protocol):
    async def __call__(
        self, limits: Limits = ..., server_limits: Limits | None = None
    ) -> tuple[Connection, Connection]: ...


@pytest.fixture
async def open_pair(case: Case) -> AsyncIterator[OpenPair]:
    """Opens connections and returns (client end, server end); aborts both afterwards."""
    async with AsyncExitStack() as stack:

        async def open_pair(
            limits: Limits = DEFAULT_LIMITS, server_limits: Limits | None = None
        ) -> tuple[Connection, Connection]:
            accepted: asyncio.Queue[Connection] = asyncio.Queue()

            async def handler(connection: Connection) -> None:
                accepted.put_nowait(connection)
                await asyncio.Event().wait()

            listener = await case.listen(handler, server_limits or limits)
            stack.push_async_callback(listener.aclose)
            client = await case.connect(listener.address, limits)
            stack.callback(client.abort)
            return client, await accepted.get()

        yield open_pair


_shm_numbers = itertools.count()


@pytest.fixture
def shm_address() -> Iterator[str]:
    """A free address; afterwards nothing of it must be left."""
    name = f"test-{os.getpid()}-{next(_shm_numbers)}"
    yield f"shm://{name}"
    assert [file for file in os.listdir("/dev/shm") if "privatelora" in file] == []
    assert name not in Path("/proc/net/unix").read_text()


class ShmAccept(Protocol):
    async def __call__(self, limits: Limits = ...) -> asyncio.Queue[Connection]: ...


@pytest.fixture
async def shm_accept(shm_address: str) -> AsyncIterator[ShmAccept]:
    """Listens on ``shm_address``; returns a queue of the connections."""
    async with AsyncExitStack() as stack:

        async def accept(limits: Limits = SMALL_QUEUE) -> asyncio.Queue[Connection]:
            accepted: asyncio.Queue[Connection] = asyncio.Queue()

            async def handler(connection: Connection) -> None:
                accepted.put_nowait(connection)
                await asyncio.Event().wait()

            listener = await listen(shm_address, handler, limits)
            stack.push_async_callback(listener.aclose)
            return accepted

        yield accept


@pytest.fixture(params=["send", "receive"])
def direction(request: pytest.FixtureRequest) -> str:
    """Which direction of an impaired connection a test is about."""
    found: str = request.param
    return found


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    """Makes rigs; aborts their connections afterwards."""
    with contextlib.ExitStack() as stack:

        def make_rig(
            *,
            send: Impairment = NOTHING,
            receive: Impairment = NOTHING,
            seed: int = 1,
            limits: Limits = LIMITS,
        ) -> Rig:
            rig = Rig(send, receive, seed, limits)
            stack.callback(rig.near.abort)
            return rig

        yield make_rig
