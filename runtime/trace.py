"""Where the time of steps went: the beginning of a cloud's work in Chrome's trace format.

The format: "Trace Event Format" (Google, 2016), complete events; Perfetto and chrome://tracing
open it. The engine is one process of the trace with its batches. Each session is another: a step
is queued, runs in a batch, waits for the edge's reply, is queued again. Steps of one session that
overlap lie in rows of their own, because events of one row may not overlap partially.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any, NamedTuple

from privatelora.errors import ConfigError
from privatelora.runtime.scheduler import Batch

MAX_BATCHES = 2000
MAX_WAITS = 2000

Event = dict[str, Any]
StepKey = tuple[int, int]
"""A session's number over the cloud, and the step's number in it."""


class _Span(NamedTuple):
    """A part of a step's life. Times are in seconds."""

    started: float
    ended: float
    name: str


class Trace:
    """Records the first batches and waits of a cloud, for a file."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if ``path`` cannot be written: before the work, not after it."""
        self._path = path
        self._batches: list[tuple[Batch, float, float]] = []
        self._waits: list[tuple[StepKey, int, float, float]] = []
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait for a reader
                raise OSError(errno.EINVAL, "not a plain file")
            path.open("a").close()
        except OSError as error:
            raise self._unwritable(error) from error

    def note_batch(self, batch: Batch, started: float, ended: float) -> None:
        """The engine ran a batch between two times, in seconds."""
        if len(self._batches) < MAX_BATCHES:
            self._batches.append((batch, started, ended))

    def note_wait(self, key: StepKey, point: int, started: float, ended: float) -> None:
        """A step waited for the reply of its edge between two times, in seconds."""
        if len(self._waits) < MAX_WAITS:
            self._waits.append((key, point, started, ended))

    def write(self) -> None:
        """Write the file. Raises ConfigError if it cannot be written any more."""
        try:
            self._path.write_text(json.dumps(self._document()))
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"cannot write the trace {self._path}: {error.strerror}")

    def _document(self) -> dict[str, Any]:
        """Names first, then events by time; the first is at 0.

        ``clock_s``: when that was by the monotonic clock of this machine, for what else is timed.
        """
        names = [_name(0, "engine")]
        events = [
            _event(
                _Span(started, ended, f"segment {batch.segment}"),
                pid=0,
                tid=0,
                args={"rows": batch.num_rows, "steps": [list(key) for key in batch.steps]},
            )
            for batch, started, ended in self._batches
        ]
        free_from: dict[int, list[float]] = {}  # of each session's rows
        steps = sorted(self._spans_of_steps().items(), key=lambda item: item[1][0])
        for (session, step), spans in steps:
            if session not in free_from:
                names.append(_name(session + 1, f"session {session}"))
            rows = free_from.setdefault(session, [])
            row = next((i for i, end in enumerate(rows) if end <= spans[0].started), len(rows))
            rows[row : row + 1] = [spans[-1].ended]
            events += [_event(span, session + 1, row, {"step": step}) for span in spans]
        events.sort(key=lambda event: float(event["ts"]))
        origin = events[0]["ts"] if events else 0
        for event in events:
            event["ts"] = (event["ts"] - origin) / 1e3
        return {"traceEvents": names + events, "otherData": {"clock_s": origin / 1e9}}

    def _spans_of_steps(self) -> dict[StepKey, list[_Span]]:
        """What happened to each step, in order."""
        spans: dict[StepKey, list[_Span]] = {}
        for batch, started, ended in self._batches:
            for key, queued_s in zip(batch.steps, batch.queued_s, strict=True):
                spans.setdefault(key, []).extend(
                    (
                        _Span(started - queued_s, started, "queued"),
                        _Span(started, ended, f"segment {batch.segment}"),
                    )
                )
        for key, point, started, ended in self._waits:
            spans.setdefault(key, []).append(_Span(started, ended, f"reply at point {point}"))
        for parts in spans.values():
            parts.sort()
        return spans


def _event(span: _Span, pid: int, tid: int, args: Event) -> Event:
    """A complete event; ``ts`` is still in nanoseconds."""
    start, end = round(span.started * 1e9), round(span.ended * 1e9)
    duration = (end - start) / 1e3
    return {
        "ph": "X",
        "name": span.name,
        "pid": pid,
        "tid": tid,
        "ts": start,
        "dur": duration,
        "args": args,
    }


def _name(pid: int, name: str) -> Event:
    return {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
