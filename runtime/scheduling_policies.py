"""Which segment runs next: small functions over what is ready.

A policy is asked before every batch. It sees the segments that are due, ascending, at least one,
and answers with the number of one of them. Fairness and the row budget are the scheduler's, so no
policy can starve anyone.

Compared by ``privatelora-bench scheduling``. Policies that prefer steps far along, or go round
the segments in a circle, leave sessions spread over the segments, where each pays for a batch of
its own; they lost everywhere and are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol


class ReadySegment(Protocol):
    """The ready steps of one segment; there is at least one."""

    @property
    def segment(self) -> int:
        """Its number."""

    @property
    def num_steps(self) -> int:
        """How many steps are ready."""

    @property
    def num_short_steps(self) -> int:
        """Those of them with few rows: decode rather than prefill."""

    @property
    def oldest_since(self) -> float:
        """Since when the one that waits for longest has been ready, in seconds."""


Policy = Callable[[Sequence[ReadySegment]], int]


def oldest(due: Sequence[ReadySegment]) -> int:
    """The segment of the step that has been ready for longest."""
    return min(due, key=attrgetter("oldest_since")).segment


def fullest(due: Sequence[ReadySegment]) -> int:
    """The segment with most ready steps; the first of several."""
    return max(due, key=attrgetter("num_steps")).segment


def laggards_first(due: Sequence[ReadySegment]) -> int:
    """The first segment with a decode step, or else the first.

    Those who are ahead wait until the others have caught up, and from there they share their
    batches: this makes batches as large as ``fullest`` does, without leaving small groups behind.
    Decode steps do not wait for prefill chunks of other segments.
    """
    return next((ready for ready in due if ready.num_short_steps), due[0]).segment


POLICIES: dict[str, Policy] = {
    policy.__name__: policy for policy in (laggards_first, fullest, oldest)
}
