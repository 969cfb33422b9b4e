"""Going on after the cloud was lost: what can be mended, when to try again, when to give up."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
from tenacity.wait import wait_random_exponential

from privatelora.errors import CapacityError, PrivateLoRAError, SessionEvicted, TransportError

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECOVERABLE = (TransportError, CapacityError)
"""A cloud that comes back may be full at first; that passes too."""

MAX_EVICTIONS = 3
"""How often in a row a cache is rebuilt; a cloud that takes it away each time has no room."""

_backoff = wait_random_exponential(multiplier=0.1, max=5.0)
"""Random, so that all edges of a cloud that comes back do not come at once."""


async def recover(
    mend: Callable[[], Awaitable[T]], error: PrivateLoRAError, patience_s: float
) -> T:
    """Do again what failed with ``error``, until it succeeds.

    ``mend`` has to begin with making a new session. Lost links are waited for ``patience_s``
    seconds, 0 for not at all. Raises what ``mend`` failed with last.
    """
    if not isinstance(error, SessionEvicted):
        if patience_s <= 0:
            raise error
        logger.warning("%s; trying to go on for %g s", error, patience_s)

    def is_over(state: RetryCallState) -> bool:
        failure = None if state.outcome is None else state.outcome.exception()
        if isinstance(failure, SessionEvicted):
            return state.attempt_number >= MAX_EVICTIONS
        return (state.seconds_since_start or 0.0) >= patience_s

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
