"""The command: many spoilt files, which does not belong into a test suite."""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from time import perf_counter

from privatelora.cli._app import MAX_LINE_CHARS, printable
from privatelora.errors import ConfigError, PartitionError
from tests.security.kinds import Kind, make_kinds

_DESCRIPTION = """\
Spoil files that somebody else may give (shards, manifests, adapters, GGUF and Hugging Face models,
plans, tokenizers) and read them. Each must be read or end in a PartitionError or ConfigError, in
little time and memory. Otherwise say which it was and exit with 1. Input i of seed s is the same
in every run.
"""
_EXAMPLE = """\
example, from the root of the repository, a few minutes:
  python -m tests.security.files --inputs 20000 --seed 1
"""

MAX_SECONDS = 1.0
"""A file that takes longer to read, whenever it is tried, is a finding."""
MAX_GROWTH_NBYTES = 64 * 2**20
"""So is one for which the process grows by more than this; all files are smaller."""
ADDRESS_SPACE_NBYTES = 16 * 2**30
"""More than this cannot be had: a reader that wants it fails at once, not this machine."""
_NUM_REPEATS = 3


class Finding(Exception):
    """Something that must not happen, and what is needed to make it happen again."""

    def __init__(self, what: str, seed: int, index: int, kind: Kind) -> None:
        super().__init__(
            f"{what}\ninput {index} of seed {seed}, {kind.name}\n"
            f"again: python -m tests.security.files --seed {seed} --start {index} --inputs 1"
        )


class Campaign:
    """Tries inputs one after the other. ``outcomes``: by kind, whether it was read or refused."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.slowest = (0.0, "")
        """Seconds, and what it was."""
        self.growth = (0, "")
        """Bytes, and for what it was."""
        self._seed = seed
        self._kinds = make_kinds(directory)
        for kind in self._kinds:
            kind.path.write_bytes(kind.good)
            kind.read()
        self.first_peak_nbytes = self.peak_nbytes = _peak_nbytes()

    def run(self, start: int, num_inputs: int) -> None:
        """Try these. Raises Finding."""
        for index in range(start, start + num_inputs):
            kind = self._kinds[index % len(self._kinds)]
            spoilt = kind.spoil(Random(f"{self._seed} {index}"))
            kind.path.unlink(missing_ok=True)  # others may have the old one mapped
            kind.path.write_bytes(spoilt)
            try:
                seconds, outcome = self._time(kind)
            except Exception as error:
                what = f"{type(error).__name__}: {printable(str(error))[:300]}"
                raise Finding(what, self._seed, index, kind) from error
            except BaseException as error:
                if type(error).__name__ != "PanicException":
                    raise
                raise Finding(f"a panic: {error}", self._seed, index, kind) from error
            finally:
                kind.path.unlink()
                kind.path.write_bytes(kind.good)
            self.outcomes[kind.name, outcome] += 1
            self.slowest = max(self.slowest, (seconds, f"input {index}, {kind.name}"))
            self._watch_memory(index, kind)

    def _time(self, kind: Kind) -> tuple[float, str]:
        """The fastest of some tries in seconds, and what came of it."""
        fastest_s = float("inf")
        for _ in range(_NUM_REPEATS):  # because other programs may have been busy
            began = perf_counter()
            outcome = _read(kind)
            fastest_s = min(fastest_s, perf_counter() - began)
            if fastest_s <= MAX_SECONDS:
                return fastest_s, outcome
        raise TimeoutError(f"it took {fastest_s:.1f} s")

    def _watch_memory(self, index: int, kind: Kind) -> None:
        before_nbytes, self.peak_nbytes = self.peak_nbytes, _peak_nbytes()
        growth_nbytes = self.peak_nbytes - before_nbytes
        self.growth = max(self.growth, (growth_nbytes, f"input {index}, {kind.name}"))
        if growth_nbytes > MAX_GROWTH_NBYTES:
            raise Finding(f"memory grew by {growth_nbytes} bytes", self._seed, index, kind)


def _peak_nbytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read(kind: Kind) -> str:
    try:
        kind.read()
    except (PartitionError, ConfigError) as error:
        line = printable(str(error))
        assert line.isprintable()
        assert 0 < len(line) <= MAX_LINE_CHARS + 3
        return "refused"
    return "read"


def summary(campaign: Campaign, seconds: float) -> str:
    """What became of all inputs, in a table."""
    outcomes = campaign.outcomes
    num_inputs = outcomes.total()
    slowest_s, slowest = campaign.slowest
    growth_nbytes, largest = campaign.growth
    total_nbytes = campaign.peak_nbytes - campaign.first_peak_nbytes
    lines = [
        f"{num_inputs} inputs in {seconds:.0f} s, {num_inputs / seconds:.0f} per second",
        "",
        f"{'':20}{'read':>8}{'refused':>10}",
    ]
    lines += [
        f"{name:20}{outcomes[name, 'read']:8}{outcomes[name, 'refused']:10}"
        for name in dict.fromkeys(name for name, _ in outcomes)
    ]
    lines += [
        "",
        f"slowest: {1000 * slowest_s:.0f} ms, {slowest}",
        f"memory: at most {growth_nbytes / 2**20:.1f} MiB more for one, {largest}; "
        f"{total_nbytes / 2**20:.1f} MiB over all",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.security.files",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inputs", type=int, default=20_000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="first one (%(default)s)")
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_NBYTES, resource.RLIM_INFINITY))
    status = 0
    with tempfile.TemporaryDirectory(prefix="privatelora-files-") as directory:
        campaign = Campaign(Path(directory), options.seed)
        began = perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                campaign.run(options.start, options.inputs)
            except Finding as finding:
                print(finding)
                status = 1
        print(summary(campaign, perf_counter() - began))
    return status


if __name__ == "__main__":
    sys.exit(main())
