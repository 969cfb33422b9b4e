"""The command: a long run, which does not belong into a test suite."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from time import monotonic

from tests.fuzz.daemons.campaign import Campaign, Report
from tests.fuzz.daemons.reports import as_json, as_text
from tests.fuzz.daemons.targets import TARGETS
from tests.fuzz.daemons.world import make_deployment

_DESCRIPTION = """\
Start the real daemons with a tiny model and send them what nobody should: spoilt bytes, frames,
messages, requests, over every transport and over HTTP, and to an edge by a hostile cloud. Whatever
comes, the daemon must live, log no defect, keep its memory, descriptors and threads, and answer
others rightly and in time. Otherwise print what is needed to see it again and exit with 1.
Input i of seed s is the same in every run; how busy the daemon is when it comes is not.
"""
_EXAMPLE = """\
example, from the root of the repository, some minutes for each target:
  python -m tests.fuzz.daemons --inputs 20000 --seed 1 --target cloud-tcp --target edge-http
"""
_PROGRESS_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.daemons",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inputs", type=int, default=2000, help="to each target (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which inputs (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="first input (%(default)s)")
    parser.add_argument(
        "--target",
        action="append",
        choices=TARGETS,
        metavar="NAME",
        help=f"one of {', '.join(TARGETS)}; may be repeated (all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    names = options.target or list(TARGETS)
    reports = []
    with tempfile.TemporaryDirectory(prefix="privatelora-fuzz-") as directory:
        deployment = make_deployment(Path(directory))
        for name in names:
            campaign = Campaign(TARGETS[name](deployment), options.seed)
            progress = _Progress(options.inputs)
            stop = options.start + options.inputs
            asyncio.run(campaign.run(options.start, stop, progress.show))
            reports.append(campaign.report)
            print(as_text(campaign.report), flush=True)
            if options.json is not None:
                options.json.write_text(as_json(reports))
    return int(any(report.finding is not None for report in reports))


class _Progress:
    """Says from time to time how far it is and how long it will take."""

    def __init__(self, num_inputs: int) -> None:
        self._num_inputs = num_inputs
        self._began = self._shown = monotonic()

    def show(self, report: Report) -> None:
        now = monotonic()
        if now - self._shown < _PROGRESS_S:
            return
        self._shown = now
        num_left = self._num_inputs - report.num_inputs
        left_s = num_left * (now - self._began) / report.num_inputs
        print(
            f"{report.target}: {report.num_inputs} of {self._num_inputs} inputs, "
            f"{left_s:.0f} s left, {report.growth_nbytes / 2**20:+.1f} MiB",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
