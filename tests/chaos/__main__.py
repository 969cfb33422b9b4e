"""The command: a long run, which does not belong into a test suite."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.campaign import NAMES, Campaign, Extent
from tests.chaos.clients import DEADLINE_S, NUM_CLIENTS
from tests.chaos.faults import KILLS, MEANINGS
from tests.chaos.outcome import Outcome
from tests.chaos.report import report
from tests.e2e.forker import Forker

_DESCRIPTION = f"""\
Start privatelora-serve and privatelora-edge on a tiny model, let {NUM_CLIENTS} clients hold
conversations over the edge's HTTP API, greedy and sampled, and meanwhile do to the daemons and
the connection between them what the seed says:

{chr(10).join(f"  {kind.ljust(13)}  {meaning}" for kind, meaning in MEANINGS.items())}

Every answer is compared with that of undisturbed daemons. Another answer, an error, an answer that
is not whole after {DEADLINE_S:g} s, a traceback in a log, a daemon that ends by itself or that
grows in a long life are failures; each is printed with what it takes to see it again, and the exit
status is then 1. Equal seeds give equal plans; what a fault meets may differ.
"""
_EXAMPLE = """\
examples, from the root of the repository:
  python -m tests.chaos --seed 1 --minutes 14
  python -m tests.chaos --seed 2 --minutes 60 --transport tcp --no-kills --json chaos.json
"""
_PROGRESS_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1, help="which faults (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="of the whole run, about (%(default)s)"
    )
    parser.add_argument(
        "--transport",
        nargs="+",
        action="extend",
        choices=NAMES,
        metavar="NAME",
        help=f"which (all): {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="transports that are tried at the same time, each for longer (%(default)s)",
    )
    parser.add_argument(
        "--faults",
        type=int,
        default=0,
        metavar="N",
        help="at least so many of each transport, however long that takes (%(default)s)",
    )
    parser.add_argument(
        "--no-kills",
        action="store_true",
        help=f"without {', '.join(KILLS)}: daemons live long enough to see whether they grow",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(arguments)
    names = list(dict.fromkeys(options.transport or NAMES))
    at_once = max(1, min(options.at_once, len(names)))
    extent = Extent(
        seconds=options.minutes * 60 * at_once / len(names),
        num_faults=options.faults,
        num_conversations=8,
        with_kills=not options.no_kills,
    )
    folder = Path(tempfile.mkdtemp(prefix="privatelora-chaos-"))
    outcomes = asyncio.run(_run(options.seed, names, at_once, extent, folder))
    print(report(outcomes))
    if options.json is not None:
        options.json.write_text(json.dumps([o.as_json() for o in outcomes], indent=1) + "\n")
    if any(outcome.failures for outcome in outcomes):
        print(f"\nthe daemons' logs are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


async def _run(
    seed: int, names: list[str], at_once: int, extent: Extent, folder: Path
) -> list[Outcome]:
    turns = asyncio.Semaphore(at_once)
    with Forker() as forker:
        campaign = Campaign(seed, extent, folder, forker)
        print("asking undisturbed daemons", file=sys.stderr, flush=True)
        await campaign.prepare()

        async def one(name: str) -> Outcome:
            async with turns:
                return await campaign.run(name)

        showing = asyncio.create_task(_show(campaign, extent.seconds * len(names) / at_once))
        try:
            return await asyncio.gather(*map(one, names))
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)


async def _show(campaign: Campaign, seconds: float) -> None:
    """Say now and then how far it is."""
    started = time.monotonic()
    while True:
        await asyncio.sleep(_PROGRESS_S)
        left = max(0.0, seconds - (time.monotonic() - started))
        now = [
            f"{name}: {sum(o.faults.values())} faults, {o.equal} equal, {len(o.failures)} failures"
            for name, o in ((name, record.outcome) for name, record in campaign.running.items())
        ]
        line = f"{left // 60:.0f} min {left % 60:02.0f} s left; {'; '.join(now)}"
        # On a terminal one line that changes, and in a file one after the other.
        end = "\x1b[K\r" if sys.stderr.isatty() else "\n"
        print(line, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
