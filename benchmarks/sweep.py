"""Tokens/s over every network, arrangement, payload and number of sessions, beside baselines.

Method. For every arrangement and transport a cloud daemon runs, and one edge process connects to
them over emulated links (``impaired``: half of the round trip time in each direction, bandwidth by
direction), a connection for each measurement. A prompt of exactly ``prompt_tokens`` ids, greedy,
end-of-sequence banned. The first tokens of each session are not counted; the rate is that of the
rest, in the time in which all sessions decode. Slow links decode fewer tokens, as many as are
predicted to take ``seconds``, at least MIN_TOKENS.

Everything is measured once in each round, and what shares a link one after the other, so that what
is compared meets the same state of the machine. Figures are medians over rounds with minimum and
maximum. Before each link the machine is measured (``predict_calibrate``), with none of the link's
figures: predictions for it are made of that, and each is compared with what its round measured.

A machine that shares its host is not always its own. What was measured while the host gave more
than MAX_STOLEN of the processors' time to others is measured again, up to ATTEMPTS times, and the
least disturbed counts; ``stolen`` says how much that still was. Predictions are of a typical token,
so a single session's are compared with the median of its tokens.

Baselines are ``replay.py``'s, over the same links; and whole models on the edge, which no link
changes, on as many threads as an edge has; ``transformers-cloud`` on the cloud's device. One that
is not installed is named as missing.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from privatelora.benchmarks.measure import Spread, StolenTime, machine_facts
from privatelora.benchmarks.sweep_bench import SweepBench
from privatelora.benchmarks.sweep_config import BaselineName, Case, SweepConfig, cases
from privatelora.errors import ConfigError
from privatelora.partition.files import write_atomic

BASE: BaselineName = "published"
"""What ratios are of, at the same link."""
MAX_STOLEN = 0.05
ATTEMPTS = 3
ROUNDS_FILE, SETTINGS_FILE = "measured.jsonl", "sweep.json"

Report = Callable[[str], None]
T = TypeVar("T")


def measure_sweep(config: SweepConfig, report: Report) -> dict[str, Any]:
    """Measure what was not measured yet; return everything.

    Raises ConfigError where the folder holds figures of other settings, PrivateLoRAError for what
    a daemon fails with.
    """
    kept = _Kept(config)
    wanted = cases(config)
    num_left = config.rounds * len(wanted) - kept.count(wanted)
    with tempfile.TemporaryDirectory(prefix="privatelora-sweep-") as name, ExitStack() as stack:
        if num_left:
            bench = SweepBench(config, Path(name), stack, report)
        clock = _Clock(num_left)
        for number in range(config.rounds):
            said = f"round {number + 1} of {config.rounds}"
            todo = [case for case in wanted if (number, str(case)) not in kept.figures]
            for link, of_link in itertools.groupby(todo, lambda case: case.link):
                if link:
                    told = _within(f"{said}, this machine", report)
                    calibration, stolen = _undisturbed(partial(bench.calibrate, told))
                    about_it = {**calibration.as_json(), "stolen": stolen}
                    kept.add(number, f"calibration for {link}", about_it)
                for case in of_link:
                    report(f"{said}, {case}{clock.left()}")
                    measure = (
                        partial(bench.measure, case, calibration)
                        if link
                        else partial(bench.measure_alone, case)
                    )
                    figures, stolen = _undisturbed(measure)
                    kept.add(number, case, {**figures, "stolen": stolen})
                    clock.tick()
    missing = kept.missing()
    rows = [_row(config, case, kept) for case in wanted if case.baseline not in missing]
    return {
        "benchmark": "sweep",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": config.model_dump(mode="json", exclude={"out"}),
        "links": {name: link.as_json() for name, link in config.parsed_links().items()},
        "missing": missing,
        "prediction": _errors(rows),
        "rows": rows,
    }


def _undisturbed(measure: Callable[[], T]) -> tuple[T, float]:
    """What it measures, and how much of the processors' time was stolen meanwhile."""
    results: list[tuple[T, float]] = []
    while len(results) < ATTEMPTS:
        stolen = StolenTime()
        results.append((measure(), stolen.share()))
        if results[-1][1] <= MAX_STOLEN:
            break
    return min(results, key=lambda result: result[1])


def _within(said: str, report: Report) -> Report:
    return lambda what: report(f"{said}: {what}")


class _Kept:
    """What was measured so far, in the folder of the sweep."""

    def __init__(self, config: SweepConfig) -> None:
        config.out.mkdir(parents=True, exist_ok=True)
        self._file = config.out / ROUNDS_FILE
        settings = config.model_dump(mode="json", exclude={"out", "rounds"})
        settings_file = config.out / SETTINGS_FILE
        if settings_file.is_file():
            before = json.loads(settings_file.read_text())
            if before != settings:
                different = [key for key in settings if before.get(key) != settings[key]]
                raise ConfigError(
                    f"{config.out} holds measurements with other settings ({', '.join(different)});"
                    " give those back, or name another folder with out"
                )
        else:
            write_atomic(settings_file, json.dumps(settings, indent=2).encode())
        self.figures: dict[tuple[int, str], dict[str, Any]] = {}
        if self._file.is_file():
            for line in self._file.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the line that was being written when a run was cut off
                self.figures[entry["round"], entry["case"]] = entry["figures"]

    def add(self, number: int, case: Case | str, figures: dict[str, Any]) -> None:
        """Write down a measurement before the next begins."""
        self.figures[number, str(case)] = figures
        with self._file.open("a") as file:
            file.write(json.dumps({"round": number, "case": str(case), "figures": figures}) + "\n")

    def count(self, wanted: Sequence[Case]) -> int:
        """How many of the measurements are there."""
        names = {str(case) for case in wanted}
        return sum(name in names for _, name in self.figures)

    def of(self, case: Case) -> dict[int, dict[str, Any]]:
        """What each round has of it."""
        return {
            number: figures
            for (number, name), figures in self.figures.items()
            if name == str(case) and "missing" not in figures
        }

    def missing(self) -> dict[str, str]:
        """Baselines that could not be measured, and why."""
        return {
            name: figures["missing"]
            for (_, name), figures in self.figures.items()
            if "missing" in figures
        }


class _Clock:
    """How long the rest will take."""

    def __init__(self, num_left: int) -> None:
        self._started = time.monotonic()
        self._num_done, self._num_left = 0, num_left

    def tick(self) -> None:
        """One measurement was made."""
        self._num_done += 1

    def left(self) -> str:
        """For people; nothing before the first measurement."""
        if self._num_done == 0:
            return ""
        each = (time.monotonic() - self._started) / self._num_done
        minutes = each * (self._num_left - self._num_done) / 60
        return f"; about {max(1, math.ceil(minutes))} min left"


def _row(config: SweepConfig, case: Case, kept: _Kept) -> dict[str, Any]:
    """Spreads over the rounds; ratios are of the same round."""
    measured = kept.of(case)
    rounds = list(measured.values())
    row: dict[str, Any] = {**case.as_json(), "rounds": len(rounds)}
    if case.link:
        row["link_text"] = config.links[case.link]
    for name in ("tokens_per_s", "time_per_token_ms_p50", "predicted_tokens_per_s", "stolen"):
        values = [figures[name] for figures in rounds if name in figures]
        if values:
            row[name] = Spread.of(values)._asdict()
    pairs = [figures for figures in rounds if "predicted_tokens_per_s" in figures]
    if pairs:
        ratios = [one["predicted_tokens_per_s"] / _typical_rate(case, one) for one in pairs]
        row["predicted_vs_measured"] = Spread.of(ratios)._asdict()
    base = {} if case.baseline == BASE else kept.of(Case(case.link, "tcp", baseline=BASE))
    shared = measured.keys() & base.keys()
    if shared:
        ratios = [measured[one]["tokens_per_s"] / base[one]["tokens_per_s"] for one in shared]
        row["vs_published"] = Spread.of(ratios)._asdict()
    return row


def _typical_rate(case: Case, figures: dict[str, Any]) -> float:
    """Tokens/s without what happens to few tokens, where one session has the cloud for itself."""
    if case.sessions > 1:
        return float(figures["tokens_per_s"])
    return 1e3 / float(figures["time_per_token_ms_p50"])


def _errors(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far predictions of our own were off, as shares of what was measured."""
    off = {
        str({name: row[name] for name in ("link", "arrangement", "payload", "sessions")}): abs(
            row["predicted_vs_measured"]["median"] - 1
        )
        for row in rows
        if "predicted_vs_measured" in row and "baseline" not in row
    }
    if not off:
        return {}
    worst = max(off, key=off.__getitem__)
    return {
        "median_error": statistics.median(off.values()),
        "worst_error": off[worst],
        "worst_case": worst,
        "cases": len(off),
    }
