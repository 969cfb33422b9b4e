"""The command: a long run, which does not belong into a test suite."""

from __future__ import annotations

import argparse
import asyncio
import sys
import warnings
from time import monotonic

from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.wire.prelude import TYPES
from tests.fuzz.campaign import Campaign, Finding, garbage_apart
from tests.fuzz.end import VERDICTS

_DESCRIPTION = """\
Send spoilt frames to both ends of a connection in every state it can be in, as the bytes of a
stream: frames, messages, tensors. Whatever comes must end as a message or as an error that says
what the peer did wrong, in little time and memory. Otherwise print what is needed to see it again
and exit with 1. Frame i of seed s is the same in every run.
"""
_EXAMPLE = """\
example, from the root of the repository, a few minutes:
  python -m tests.fuzz --frames 1000000 --seed 1
"""
_BATCH_FRAMES = 1000
_PROGRESS_S = 10.0


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--frames", type=int, default=100_000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which frames (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="first frame (%(default)s)")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this time")
    options = parser.parse_args(arguments)
    return asyncio.run(_fuzz(options.seed, options.start, options.frames, options.seconds))


async def _fuzz(seed: int, start: int, num_frames: int, max_seconds: float | None) -> int:
    campaign = Campaign(seed, start)
    began = shown = monotonic()
    status = 0
    with garbage_apart(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for first in range(start, start + num_frames, _BATCH_FRAMES):
            try:
                campaign.run(min(first + _BATCH_FRAMES, start + num_frames))
            except Finding as finding:
                print(finding)
                status = 1
                break
            now = monotonic()
            if max_seconds is not None and now - began >= max_seconds:
                break
            if now - shown >= _PROGRESS_S:
                shown = now
                print(f"{campaign.num_frames} frames, {now - began:.0f} s", flush=True)
    print(summary(campaign, monotonic() - began))
    return status


def summary(campaign: Campaign, seconds: float) -> str:
    """What became of all frames, in a few tables."""
    num_frames = campaign.num_frames
    lines = [
        f"{num_frames} frames of seed {campaign.seed} in {seconds:.0f} s, "
        f"{num_frames / seconds:.0f} per second",
        "",
        *(f"{count:10} {name}" for name, count in campaign.outcomes.most_common()),
        "",
        "what arrived".ljust(16) + "".join(verdict.rjust(10) for verdict in VERDICTS),
    ]
    names = [*(kind.__name__ for kind in TYPES), "unknown"]
    frames, tensors = campaign.tally.frames, campaign.tally.tensors
    lines += [
        name.ljust(16) + "".join(f"{frames[name, verdict]:10}" for verdict in VERDICTS)
        for name in names
    ]
    lines += ["", "tensors".ljust(16) + "      read   refused"]
    lines += [
        name.ljust(16) + f"{tensors[name, True]:10}{tensors[name, False]:10}"
        for name in (*CODEC_NAMES, "unknown")
    ]
    slowest_us, index = campaign.slowest
    lines += [
        "",
        f"slowest: {slowest_us:.0f} us, frame {index}",
        f"memory: grew by {campaign.growth_nbytes / 2**20:.1f} MiB",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
