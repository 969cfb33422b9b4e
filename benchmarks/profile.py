"""Where one token's time goes, both ends on one clock.

Method. A cloud daemon writes its trace (``trace`` of its settings): when batches ran, and when a
step waited to be run. An edge process notes when it was busy. Both on one machine use one monotonic
clock, so their times are laid over each other as they are. Distance is emulated on the edge's
connection. Every moment of a token, from the token before it to itself, belongs to one part: what
the edge does (embedding, exchanges, LM head, choosing the token), what the cloud does while the
edge does nothing, both at once, a step that is queued at the cloud, or else the network, with
whatever a transport and an event loop take. First tokens are left out; figures are medians over
tokens.
"""

from __future__ import annotations

import bisect
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from privatelora.benchmarks.measure import machine_facts
from privatelora.benchmarks.serve import (
    NUM_SKIPPED,
    ServeSettings,
    cloud_config,
    edge_config,
    prepare,
    write_settings,
)
from privatelora.cli._daemons import Daemon
from privatelora.errors import PrivateLoRAError

EDGE_PARTS = {
    "embed": "edge: embedding and sending",
    "exchange": "edge: exchanges",
    "head": "edge: LM head",
    "choose": "edge: choosing the token",
}
CLOUD, BOTH, QUEUED, NETWORK = "cloud: layers", "both at once", "cloud: queued", "network"
PARTS = (*EDGE_PARTS.values(), BOTH, CLOUD, QUEUED, NETWORK)
"""In the order of a picture."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Span:
    """A part of the time of one end, in seconds of the machine's monotonic clock."""

    name: str
    started: float
    ended: float


class Timeline(NamedTuple):
    """What was noted while tokens were decoded. ``tokens``: when each came."""

    edge: list[Span]
    cloud: list[Span]
    queued: list[Span]
    tokens: list[float]


def measure_profile(settings: ServeSettings, report: Report) -> dict[str, Any]:
    """Decode in one session at every distance of ``settings``."""
    report("splitting the model")
    round_trips = prepare(settings)
    rows = []
    for rtt_ms in settings.rtts_ms:
        report(f"decoding at {rtt_ms:g} ms")
        rows.append({"rtt_ms": rtt_ms, **_row(_decode(settings, rtt_ms))})
    return {
        "benchmark": "profile",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {
            **settings.deployment,
            "prompt_tokens": settings.prompt_tokens,
            "tokens": settings.tokens,
        },
        "round_trips_per_token": round_trips,
        "rows": rows,
    }


def _decode(settings: ServeSettings, rtt_ms: float) -> Timeline:
    trace = settings.directory / "trace.json"
    cloud_file = write_settings(
        settings.directory / "cloud.yaml", cloud_config(settings) | {"trace": str(trace)}
    )
    with Daemon("privatelora.cli.serve", cloud_file) as cloud:
        address = cloud.read_address()
        file = write_settings(settings.directory / "edge.yaml", edge_config(address, rtt_ms))
        counts = (str(settings.prompt_tokens), str(settings.tokens))
        with Daemon("privatelora.benchmarks.profile_worker", file, *counts) as edge:
            noted = edge.read_event("decoded")
        cloud.stop()
    return _timeline(noted, json.loads(trace.read_text()))


def _timeline(noted: dict[str, Any], trace: dict[str, Any]) -> Timeline:
    origin = trace["otherData"]["clock_s"]
    cloud, queued = [], []
    for event in trace["traceEvents"]:
        if event["ph"] != "X":
            continue
        started = origin + event["ts"] / 1e6
        span = Span(event["name"], started, started + event["dur"] / 1e6)
        if event["pid"] == 0:
            cloud.append(span)
        elif event["name"] == "queued":
            queued.append(span)
    edge = [Span(EDGE_PARTS[name], started, ended) for name, started, ended in noted["spans"]]
    heads = [span.ended for span in edge if span.name == EDGE_PARTS["head"]]
    tokens: list[float] = noted["tokens"]
    for moment in tokens:  # from the end of its LM head to a token
        index = bisect.bisect_right(heads, moment) - 1
        if index >= 0:
            edge.append(Span(EDGE_PARTS["choose"], heads[index], moment))
    # The next token's embedding begins when the generation loop goes on with it.
    edge.sort(key=lambda span: span.started)
    covered = max((span.ended for span in cloud), default=0.0)
    return Timeline(edge, cloud, queued, [moment for moment in tokens if moment <= covered + 1])


def token_parts(timeline: Timeline) -> list[dict[str, float]]:
    """Seconds of each part, for each token after the first ones."""
    spans = [
        *((span, 0) for span in timeline.edge),
        *((span, 1) for span in timeline.cloud),
        *((span, 2) for span in timeline.queued),
    ]
    return [
        _parts(spans, started, ended)
        for started, ended in itertools.pairwise(timeline.tokens[NUM_SKIPPED:])
    ]


def _parts(spans: Sequence[tuple[Span, int]], started: float, ended: float) -> dict[str, float]:
    """Cut one token's time wherever anything begins or ends, and name every piece."""
    inside = [(span, kind) for span, kind in spans if span.started < ended and span.ended > started]
    cuts = {started, ended}
    for span, _ in inside:
        cuts |= {min(max(moment, started), ended) for moment in (span.started, span.ended)}
    parts = dict.fromkeys(PARTS, 0.0)
    for begin, end in itertools.pairwise(sorted(cuts)):
        middle = (begin + end) / 2
        here: list[str | None] = [None, None, None]
        for span, kind in inside:
            if span.started <= middle < span.ended:
                here[kind] = span.name
        edge, cloud, queued = here
        if edge is not None:
            name = BOTH if cloud is not None else edge
        elif cloud is not None:
            name = CLOUD
        else:
            name = QUEUED if queued is not None else NETWORK
        parts[name] += end - begin
    return parts


def _row(timeline: Timeline) -> dict[str, Any]:
    tokens = token_parts(timeline)
    if not tokens:
        raise PrivateLoRAError("the trace has no whole token: decode more tokens")
    totals = [sum(parts.values()) for parts in tokens]
    middle = totals.index(statistics.median_low(totals))
    started, ended = timeline.tokens[NUM_SKIPPED:][middle : middle + 2]
    return {
        "token_ms": statistics.median(totals) * 1e3,
        "tokens_per_s": 1 / statistics.median(totals),
        "num_tokens": len(tokens),
        "parts_ms": {
            name: statistics.median(parts[name] for parts in tokens) * 1e3 for name in PARTS
        },
        "example": {
            side: [
                [span.name, (span.started - started) * 1e3, (span.ended - started) * 1e3]
                for span in spans
                if span.started < ended and span.ended > started
            ]
            for side, spans in (("edge", timeline.edge), ("cloud", timeline.cloud))
        },
        "example_ms": (ended - started) * 1e3,
    }
