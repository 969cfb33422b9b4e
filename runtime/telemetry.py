"""What a cloud does, in numbers for Prometheus.

Recording must cost next to nothing while sessions run, so numbers are added up in plain Python
by the one thread that serves, and become metric families when somebody asks. That thread may be
another: it may see an observation in a sum and not yet in its count, which the next scrape mends.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from privatelora.runtime.scheduler import Batch
from privatelora.transports.base import Connection

PREFIX = "privatelora_cloud_"
COUNT_BOUNDS = tuple(2.0**power for power in range(11))
TIME_BOUNDS = (
    *(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2),
    *(5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
"""In seconds."""


class Occupancy(NamedTuple):
    """How full a cloud is now."""

    connections: int
    sessions: int
    detached_sessions: int
    waiting_sessions: int
    kv_blocks_used: int
    kv_blocks: int


class _Histogram:
    """Counts observations between bounds, which belong to the bucket they end."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def family(self, name: str, text: str) -> Metric:
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(PREFIX + name, text, buckets, self.sum)


@dataclass(slots=True)
class _Sums:
    """What one segment, or one exchange point, took."""

    count: int = 0
    rows: int = 0
    busy_s: float = 0.0
    queued_s: float = 0.0


class CloudMetrics(Collector):
    """The numbers of one cloud, in a registry of their own.

    Everything but ``collect`` is for the thread that serves.
    """

    def __init__(self, occupancy: Callable[[], Occupancy]) -> None:
        """``occupancy`` is called when somebody asks, from any thread."""
        self.positions = 0
        self.sessions_opened = 0
        self.sessions_refused = 0
        self.sessions_evicted = 0
        self.sessions_resumed = 0
        self._occupancy = occupancy
        self._batch_rows = _Histogram(COUNT_BOUNDS)
        self._batch_steps = _Histogram(COUNT_BOUNDS)
        self._batch_compute = _Histogram(TIME_BOUNDS)
        self._queue = _Histogram(TIME_BOUNDS)
        self._reply = _Histogram(TIME_BOUNDS)
        self._segments: defaultdict[int, _Sums] = defaultdict(_Sums)
        self._points: defaultdict[int, _Sums] = defaultdict(_Sums)
        self._connections_lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._sent_nbytes = 0  # of connections that are over
        self._received_nbytes = 0
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def note_batch(self, batch: Batch, started: float, ended: float) -> None:
        """The engine ran a batch between two times, in seconds."""
        self._batch_rows.observe(batch.num_rows)
        self._batch_steps.observe(len(batch.steps))
        self._batch_compute.observe(ended - started)
        observe = self._queue.observe
        for queued_s in batch.queued_s:
            observe(queued_s)
        segment = self._segments[batch.segment]
        segment.count += 1
        segment.rows += batch.num_rows
        segment.busy_s += ended - started
        segment.queued_s += sum(batch.queued_s)

    def note_wait(self, key: tuple[int, int], point: int, started: float, ended: float) -> None:
        """A step waited for the reply of its edge between two times, in seconds."""
        self._reply.observe(ended - started)
        replies = self._points[point]
        replies.count += 1
        replies.busy_s += ended - started

    @contextmanager
    def counting(self, connection: Connection) -> Iterator[None]:
        """Count the bytes of a connection; it is over when the context is left."""
        with self._connections_lock:
            self._connections.add(connection)
        try:
            yield
        finally:
            with self._connections_lock:
                self._connections.remove(connection)
                self._sent_nbytes += connection.counters.sent_nbytes
                self._received_nbytes += connection.counters.received_nbytes

    def _by_place(self) -> Iterator[Metric]:
        """What each segment and each exchange point took, so that their means can be compared."""
        for label, places, families in (
            (
                "segment",
                self._segments,
                (
                    ("segment_batches", "Batches of a segment.", "count"),
                    ("segment_rows", "Positions computed in a segment.", "rows"),
                    ("segment_compute_seconds", "Time in the engine.", "busy_s"),
                    ("segment_queue_seconds", "Time that steps were ready before.", "queued_s"),
                ),
            ),
            (
                "point",
                self._points,
                (
                    ("point_replies", "Replies to the exchanges of a point.", "count"),
                    ("point_reply_seconds", "Time from sending z to the edge's reply.", "busy_s"),
                ),
            ),
        ):
            for name, text, field in families:
                family = CounterMetricFamily(PREFIX + name, text, labels=[label])
                for number, sums in sorted(places.items()):
                    family.add_metric([str(number)], getattr(sums, field))
                yield family

    def collect(self) -> Iterable[Metric]:
        """All families as they are now."""
        rows, steps = self._batch_rows, self._batch_steps
        yield rows.family("batch_rows", "Positions that the engine computed at once.")
        yield steps.family("batch_steps", "Steps that the engine computed at once.")
        yield self._batch_compute.family(
            "batch_compute_seconds", "Time of one batch in the engine, through one segment."
        )
        yield self._queue.family(
            "queue_seconds", "Time that a step was ready before the engine took it."
        )
        yield self._reply.family(
            "reply_seconds", "Time from sending z to the edge's reply: the wire and the edge."
        )
        with self._connections_lock:
            counters = [connection.counters for connection in self._connections]
            sent = self._sent_nbytes + sum(one.sent_nbytes for one in counters)
            received = self._received_nbytes + sum(one.received_nbytes for one in counters)
        for name, text, value in (
            ("batches", "Batches that the engine ran.", rows.count),
            ("rows", "Positions computed, each counted in every segment.", rows.sum),
            ("positions", "Positions computed to the end: tokens read or made.", self.positions),
            ("sessions_opened", "Sessions that were let in.", self.sessions_opened),
            ("sessions_refused", "Sessions that were not let in.", self.sessions_refused),
            ("sessions_evicted", "Idle sessions that lost their cache.", self.sessions_evicted),
            (
                "sessions_resumed",
                "Sessions that went on with the cache they had.",
                self.sessions_resumed,
            ),
            ("sent_bytes", "Bytes sent to edges, framing included.", sent),
            ("received_bytes", "Bytes received from edges, framing included.", received),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value)
        yield from self._by_place()
        now = self._occupancy()
        for name, text, value in (
            ("connections", "Edges that are connected.", now.connections),
            ("sessions", "Sessions that are open.", now.sessions),
            (
                "detached_sessions",
                "Caches kept for edges that lost their connection.",
                now.detached_sessions,
            ),
            ("waiting_sessions", "Sessions that wait for room.", now.waiting_sessions),
            ("kv_blocks_used", "Blocks of the KV cache in use.", now.kv_blocks_used),
            ("kv_blocks", "Blocks that the KV cache has.", now.kv_blocks),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value)
