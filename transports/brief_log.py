"""A log that strangers cannot flood."""

from __future__ import annotations

import logging
from time import monotonic

_MAX_AT_ONCE = 50
_INTERVAL_S = 2.0


class BriefLog:
    """Passes on what happens now and then; of a flood, a line in two seconds.

    For what anybody who reaches a port can cause as often as they like. A line that follows others
    which were left out says how many those were.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._num_left = float(_MAX_AT_ONCE)
        self._counted_at = monotonic()
        self._num_left_out = 0

    def warning(self, message: str, *args: object) -> None:
        """Log a warning, as ``logging.Logger.warning`` does, or leave it out."""
        now = monotonic()
        earned = (now - self._counted_at) / _INTERVAL_S
        self._num_left = min(_MAX_AT_ONCE, self._num_left + earned)
        self._counted_at = now
        if self._num_left < 1:
            self._num_left_out += 1
            return
        self._num_left -= 1
        if self._num_left_out:
            message += " (%d lines of this kind were left out before)"
            args += (self._num_left_out,)
            self._num_left_out = 0
        self._logger.warning(message, *args)
