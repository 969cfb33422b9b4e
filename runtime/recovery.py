"""Going on after the cloud was lost: what can be mended, when to try again, when to give up."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
from tenacity.wait import wait_random_exponential

from privatelora.errors import (
    AuthError,
    CapacityError,
    CloudDraining,
    PrivateLoRAError,
    ProtocolError,
    SessionEvicted,
    TransportError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECOVERABLE = (TransportError, CapacityError, ProtocolError, AuthError)
"""A cloud that comes back may be full at first; that passes too."""
LOST = (TransportError, CloudDraining)
"""What begins it, beside what only a session or a connection that was good meets."""

MAX_EVICTIONS = 3
"""How often in a row a cache is rebuilt; a cloud that takes it away each time has no room."""
MAX_BREACHES = 5
"""How often bytes that make no sense are taken for damage on the way, in whatever they appear, a
handshake as well. Where they come each time, something is wrong that does not pass."""

_backoff = wait_random_exponential(multiplier=0.1, max=5.0)
"""Random, so that all edges of a cloud that comes back do not come at once."""


async def recover(
    mend: Callable[[], Awaitable[T]], error: PrivateLoRAError, patience_s: float
) -> T:
    """Do again what failed with ``error``, until it succeeds.

    ``mend`` has to begin with opening the session again. Lost links are waited for ``patience_s``
    seconds, 0 for not at all. Raises what ``mend`` failed with last.
    """
    if not isinstance(error, SessionEvicted):
        if patience_s <= 0:
            raise error
        logger.warning("%s; trying to go on for %g s", error, patience_s)
    num_evictions = num_breaches = 0

    def is_over(state: RetryCallState) -> bool:
        nonlocal num_evictions, num_breaches
        failure = None if state.outcome is None else state.outcome.exception()
        if isinstance(failure, SessionEvicted):
            num_evictions += 1
            return num_evictions >= MAX_EVICTIONS
        if isinstance(failure, ProtocolError | AuthError):
            num_breaches += 1
        is_late = (state.seconds_since_start or 0.0) >= patience_s
        return is_late or num_breaches >= MAX_BREACHES

    def pause(state: RetryCallState) -> float:
        failure = None if state.outcome is None else state.outcome.exception()
        if isinstance(failure, SessionEvicted):
            return 0.0
        left = patience_s - (state.seconds_since_start or 0.0)
        return max(0.0, min(_backoff(state), left))

    retrying = AsyncRetrying(
        retry=retry_if_exception_type(RECOVERABLE), stop=is_over, wait=pause, reraise=True
    )
    return await retrying(mend)
