"""How much memory Python has at a time; ``tracemalloc`` has to be on."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import suppress

from privatelora.errors import RemoteProtocolError, VersionMismatch

CONSTANT_NBYTES = 2**20
"""What an end may take for any frame, however small. Among it a frame and lists that were only
announced, and what MessagePack takes to write."""


def begin_peak() -> int:
    """Forget earlier peaks; memory in use."""
    tracemalloc.reset_peak()
    return tracemalloc.get_traced_memory()[0]


def peak_since(before: int) -> int:
    """Most memory at a time since ``begin_peak``, beyond what was in use then."""
    return tracemalloc.get_traced_memory()[1] - before


def peak_nbytes(work: Callable[[], object]) -> int:
    """Most memory that ``work`` had at a time."""
    before = begin_peak()
    with suppress(RemoteProtocolError, VersionMismatch):
        work()
    return peak_since(before)
