"""Fixtures: nothing may be left behind, neither tasks nor complaints of the event loop."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator

import pytest


@pytest.fixture(scope="session")
def frozen_heap() -> Iterator[None]:
    """Leave what was imported out of garbage collections, which then take no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
async def nothing_leaks(frozen_heap: None, caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """Fail the test if it leaves a task, or an exception that nobody retrieved."""
    tasks = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - tasks - {asyncio.current_task()}
    assert not left
    gc.collect()  # futures complain when they are freed
    assert [record for record in caplog.records if record.name == "asyncio"] == []
