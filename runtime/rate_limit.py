"""How often something may begin. Pure: no clock, no waiting."""

from __future__ import annotations

BURST_S = 1.0


class RateLimit:
    """At most ``per_s`` a second on average, and about one second's worth of them at once.

    The generic cell rate algorithm (ITU-T I.371) in its virtual scheduling form: ``_due`` is
    when the next one would begin were they evenly spaced, and it may be earlier than that by
    ``_ahead_s``. In any span of t seconds at most ``per_s * t + max(1, per_s * BURST_S)`` begin.
    Times are seconds of one clock of the caller's.
    """

    __slots__ = ("_ahead_s", "_due", "_interval_s")

    def __init__(self, per_s: float) -> None:
        """``per_s``: above 0; below one a second none begin together."""
        self._interval_s = 1.0 / per_s
        self._ahead_s = max(0.0, BURST_S - self._interval_s)
        self._due = float("-inf")

    def delay(self, now: float) -> float:
        """Seconds until the next one may begin; 0 if it may now."""
        return max(0.0, self._due - self._ahead_s - now)

    def take(self, now: float) -> None:
        """One begins. If it should not yet, those after it wait for longer."""
        self._due = max(self._due, now) + self._interval_s

    def is_unused(self, now: float) -> bool:
        """Whether it is as if nothing had ever begun."""
        return self._due <= now
