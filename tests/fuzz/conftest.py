"""Fixtures of the fuzz tests."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest


@pytest.fixture
def traced() -> Iterator[None]:
    """Python keeps account of its memory. It knows all but torch's own."""
    tracemalloc.start()
    yield
    tracemalloc.stop()
