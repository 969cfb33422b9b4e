"""Fixtures of the end-to-end tests: processes are shared, because starting one takes seconds."""

from __future__ import annotations

import pytest

from tests.e2e.processes import Commands


@pytest.fixture(scope="session")
def commands() -> Commands:
    """Runs commands, each in a process of its own."""
    return Commands()
