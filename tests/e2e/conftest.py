"""Fixtures of the end-to-end tests: processes are shared, because starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.processes import Commands


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Runs commands, each in a process of its own."""
    with Commands() as started:
        yield started
