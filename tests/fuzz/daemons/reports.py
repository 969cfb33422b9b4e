"""The figures of a run, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tests.fuzz.daemons.campaign import Report
from tests.fuzz.daemons.inputs import Outcome

_MIB = 2**20


def as_text(report: Report) -> str:
    """One target's, as a table by kind of input, and what was found."""
    seconds = max(report.seconds, 1e-9)
    kinds = sorted({kind for kind, _ in report.outcomes})
    width = max(map(len, [report.target, *kinds])) + 2
    lines = [
        "",
        report.target.ljust(width) + "".join(outcome.rjust(11) for outcome in Outcome),
        *(
            kind.ljust(width) + "".join(f"{report.outcomes[kind, end]:11}" for end in Outcome)
            for kind in kinds
        ),
        f"{report.num_inputs} inputs of seed {report.seed} in {seconds:.0f} s, "
        f"{report.num_inputs / seconds:.0f} per second",
        f"memory {report.resident_nbytes / _MIB:.0f} MiB, {report.growth_nbytes / _MIB:+.1f} MiB "
        f"since the warm-up, at most {report.jump_nbytes / _MIB:.1f} MiB more for a moment; "
        f"descriptors {report.num_fds[0]} before, {report.num_fds[1]} after; "
        f"threads {report.num_threads[0]}, {report.num_threads[1]}",
    ]
    if report.finding is not None:
        lines += ["", f"FINDING {report.finding}"]
    return "\n".join(lines)


def as_json(reports: Sequence[Report]) -> str:
    """All figures of several targets."""
    return json.dumps([_plain(report) for report in reports], indent=2)


def _plain(report: Report) -> dict[str, Any]:
    kinds = sorted({kind for kind, _ in report.outcomes})
    return {
        "target": report.target,
        "seed": report.seed,
        "inputs": report.num_inputs,
        "seconds": round(report.seconds, 1),
        "outcomes": {
            kind: {str(end): report.outcomes[kind, end] for end in Outcome} for kind in kinds
        },
        "growth_nbytes": report.growth_nbytes,
        "jump_nbytes": report.jump_nbytes,
        "resident_nbytes": report.resident_nbytes,
        "num_fds": report.num_fds,
        "num_threads": report.num_threads,
        "finding": None
        if report.finding is None
        else {**asdict(report.finding), "command": report.finding.command},
    }
