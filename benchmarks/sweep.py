"""Tokens/s over every network, arrangement, payload and number of sessions, beside baselines.

Method. For every arrangement and transport a cloud daemon runs, and one edge process connects to
them over emulated links (``impaired``: half of the round trip time in each direction, bandwidth by
direction), a connection for each measurement. A prompt of exactly ``prompt_tokens`` ids, greedy,
end-of-sequence banned. The first tokens of each session are not counted; the rate is that of the
rest, in the time in which all sessions decode. Slow links decode fewer tokens, as many as are
predicted to take ``seconds``, at least MIN_TOKENS.

Everything is measured once in each round, and what shares a link one after the other, so that what
is compared meets the same state of the machine. Figures are medians over rounds with minimum and
maximum. At the start of each round the machine is measured too (``predict_calibrate``), with none
of the network: predictions are made of that, and each is compared with what its round measured.

Baselines are ``replay.py``'s, over the same links; and whole models on the edge, which no link
changes, on as many threads as an edge has. One that is not installed is named as missing.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from privatelora.benchmarks.measure import Spread, machine_facts
from privatelora.benchmarks.predict import predict
from privatelora.benchmarks.predict_calibrate import CalibrateSettings, Calibration, calibrate
from privatelora.benchmarks.predict_choose import TRANSPORTS
from privatelora.benchmarks.predict_hardware import Link
from privatelora.benchmarks.predict_terms import Scenario
from privatelora.benchmarks.replay import ReplayRequest, Traffic, traffic
from privatelora.benchmarks.serve import NUM_SKIPPED, STEP_TIMEOUT_S, summarise, write_settings
from privatelora.benchmarks.shards import split_with_adapter
from privatelora.benchmarks.sweep_alone import measure_alone
from privatelora.benchmarks.sweep_config import ALONE, Case, SweepConfig, cases
from privatelora.cli._daemons import Daemon
from privatelora.errors import ConfigError, PrivateLoRAError
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.files import write_atomic
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import make_plan
from privatelora.runtime.codecs import Codecs

MIN_TOKENS = 8
ROUNDS_FILE, SETTINGS_FILE = "measured.jsonl", "sweep.json"
LISTEN = {
    "tcp": "tcp://127.0.0.1:0",
    "shm": "shm://privatelora-sweep-{pid}-{number}",
    "zmq+tcp": "zmq+tcp://127.0.0.1:0",
}

Report = Callable[[str], None]


@dataclass
class _Places:
    """What runs, and where its files are."""

    directory: Path
    plans: dict[str, Plan] = field(default_factory=dict)
    clouds: dict[tuple[str, str], str] = field(default_factory=dict)
    """Addresses, by arrangement and transport."""
    replay_cloud: str = ""

    def shards(self, arrangement: str) -> Path:
        """Both shards of an arrangement, and its adapter."""
        return self.directory / f"shards-{list(self.plans).index(arrangement)}"


def measure_sweep(config: SweepConfig, report: Report) -> dict[str, Any]:
    """Measure what was not measured yet; return everything.

    Raises ConfigError where the folder holds figures of other settings, PrivateLoRAError for what
    a daemon fails with.
    """
    kept = _Kept(config)
    wanted = cases(config)
    num_left = config.rounds * len(wanted) - kept.count(wanted)
    with tempfile.TemporaryDirectory(prefix="privatelora-sweep-") as name, ExitStack() as stack:
        places = _Places(Path(name))
        if num_left:
            report("splitting the model")
            _split(config, places)
            edge = _enter(config, places, stack)
        clock = _Clock(num_left)
        for number in range(config.rounds):
            todo = [case for case in wanted if (number, str(case)) not in kept.figures]
            if not todo:
                continue
            calibration = _calibrated(config, places, number, kept, report)
            for case in todo:
                report(f"round {number + 1} of {config.rounds}, {case}{clock.left()}")
                try:
                    figures = _measure(config, places, edge, case, calibration)
                except _MissingError as error:
                    figures = {"missing": str(error)}
                kept.add(number, case, figures)
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


class _MissingError(Exception):
    """A baseline that cannot be measured here."""


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

    def of(self, case: Case) -> list[dict[str, Any]]:
        """Every round of it."""
        return [figures for (_, name), figures in self.figures.items() if name == str(case)]

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


def _split(config: SweepConfig, places: _Places) -> None:
    """Shards and an adapter for every arrangement."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    with open_checkpoint(config.model) as checkpoint:
        for name, arrangement in config.arrangements.items():
            plan = make_plan(checkpoint.config, **arrangement.model_dump())
            places.plans[name] = plan
            place = places.shards(name)
            split_with_adapter(checkpoint, plan, place, place / "adapter.safetensors", dtype)


def _enter(config: SweepConfig, places: _Places, stack: ExitStack) -> Daemon:
    """Start the clouds and the edge's worker, all at once; return the worker."""
    starting: dict[tuple[str, str], Daemon] = {}
    for arrangement in config.arrangements:
        for transport in config.transports:
            settings = _cloud_settings(config, places, arrangement, transport, len(starting))
            file = write_settings(places.directory / f"cloud-{len(starting)}.yaml", settings)
            cloud = stack.enter_context(Daemon("privatelora.cli.serve", file))
            starting[arrangement, transport] = cloud
    replaying = None
    if any(name not in ALONE for name in config.baselines):
        shards = places.shards(next(iter(config.arrangements)))
        counts = (config.dtype, str(config.num_threads))
        daemon = Daemon("privatelora.benchmarks.replay_cloud", shards, *counts)
        replaying = stack.enter_context(daemon)
    edge = stack.enter_context(Daemon("privatelora.benchmarks.sweep_worker"))
    places.clouds = {key: _address(cloud) for key, cloud in starting.items()}
    places.replay_cloud = "" if replaying is None else _address(replaying)
    edge.read_event("ready")
    return edge


def _address(cloud: Daemon) -> str:
    """Where it listens, once it does."""
    return cloud.read_line().removeprefix("ready ").strip()


def _cloud_settings(
    config: SweepConfig, places: _Places, arrangement: str, transport: str, number: int
) -> dict[str, Any]:
    most = max(16, *config.sessions)
    positions = config.prompt_tokens + config.tokens + 64
    return {
        "listen": LISTEN[transport].format(pid=os.getpid(), number=number),
        "shard": str(places.shards(arrangement) / "cloud"),
        "dtype": config.dtype,
        "num_threads": config.num_threads,
        "max_sessions": most,
        "max_sessions_per_client": most,
        "max_cached_positions": 1024 + most * positions,
    }


def _calibrated(
    config: SweepConfig, places: _Places, number: int, kept: _Kept, report: Report
) -> Calibration:
    """This machine as predictions take it, measured now."""
    place = places.directory / f"calibration-{number}"
    place.mkdir()

    def told(what: str) -> None:
        report(f"round {number + 1} of {config.rounds}, this machine: {what}")

    calibration = calibrate(
        CalibrateSettings(config.model, place, config.dtype, config.num_threads), told
    )
    kept.add(number, "calibration", calibration.as_json())
    return calibration


def _measure(
    config: SweepConfig, places: _Places, edge: Daemon, case: Case, calibration: Calibration
) -> dict[str, Any]:
    """Tokens/s, and what was predicted."""
    if case.baseline in ALONE:
        try:
            rate = measure_alone(config, places.shards(next(iter(places.plans))), case.baseline)
        except PrivateLoRAError as error:
            raise _MissingError(str(error)) from error
        return {"tokens_per_s": rate}
    link = config.parsed_links()[case.link]
    sent = _traffic(case, calibration)
    predicted = (
        _predicted(config, places, case, calibration, link)
        if sent is None
        else 1 / sent.seconds(_compute_s(calibration), link)
    )
    wanted = round(config.seconds * predicted / case.sessions)
    tokens = NUM_SKIPPED + max(MIN_TOKENS, min(config.tokens, wanted))
    impaired = _impaired(link)
    request: dict[str, Any]
    if sent is None:
        request = {
            "kind": "ours",
            "edge": str(_edge_file(config, places, case, impaired)),
            "sessions": case.sessions,
            "prompt_tokens": config.prompt_tokens,
            "tokens": tokens,
        }
    else:
        replayed = ReplayRequest(traffic=sent, prompt_tokens=config.prompt_tokens, tokens=tokens)
        request = {
            "kind": "replay",
            "cloud": places.replay_cloud,
            "impaired": impaired,
            "replay": replayed.model_dump(),
        }
    edge.write_line(json.dumps(request))
    event = edge.read_event("decoded", "failed")
    if event["event"] == "failed":
        raise PrivateLoRAError(f"{case}: {event['error']}")
    figures = summarise(event["times"])
    return {
        "tokens_per_s": figures["aggregate_tokens_per_s"],
        "time_per_token_ms_p50": figures["time_per_token_ms_p50"],
        "time_per_token_ms_p99": figures["time_per_token_ms_p99"],
        "predicted_tokens_per_s": predicted,
        "tokens": tokens,
    }


def _traffic(case: Case, calibration: Calibration) -> Traffic | None:
    """What a baseline sends; None for our own."""
    return None if not case.baseline else traffic(case.baseline, calibration.shape.config)


def _compute_s(calibration: Calibration) -> float:
    """One token of the whole model, on the threads of one process."""
    return calibration.measured["unsplit_token"]


def _predicted(
    config: SweepConfig, places: _Places, case: Case, calibration: Calibration, link: Link
) -> float:
    """Tokens/s of all sessions, which share the link of their edge."""
    transport_s = next(
        one.round_trip_s for one in TRANSPORTS if one.scheme.startswith(f"{case.transport}:")
    )
    payload = config.payloads[case.payload]
    scenario = Scenario(
        calibration.shape,
        places.plans[case.arrangement],
        Codecs(*(names[0] for names in astuple(payload.preferences()))),
        replace(link, rtt_s=link.rtt_s + transport_s),
        calibration.cloud,
        calibration.edge,
        sessions=case.sessions,
        context=config.prompt_tokens + config.tokens // 2,
    )
    computed = predict(scenario)
    wire_s = max(link.up_s(computed.nbytes.up), link.down_s(computed.nbytes.down))
    return min(computed.aggregate_tokens_per_s, 1 / wire_s if wire_s else math.inf)


def _impaired(link: Link) -> dict[str, Any] | None:
    """The link as an edge's settings have it."""
    if link == Link():
        return None
    ways = {"up": link.up_bits_per_s, "down": link.down_bits_per_s}
    return {
        way: {"delay_ms": link.rtt_s * 1e3 / 2}
        | ({} if math.isinf(bits_per_s) else {"bandwidth_mbps": bits_per_s / 1e6})
        for way, bits_per_s in ways.items()
    }


def _edge_file(
    config: SweepConfig, places: _Places, case: Case, impaired: dict[str, Any] | None
) -> Path:
    shards = places.shards(case.arrangement)
    values = {
        "cloud": places.clouds[case.arrangement, case.transport],
        "shard": str(shards / "edge"),
        "adapter": str(shards / "adapter.safetensors"),
        "dtype": config.dtype,
        "num_threads": config.num_threads,
        "payload": config.payloads[case.payload].model_dump(mode="json"),
        "step_timeout_s": STEP_TIMEOUT_S,
    }
    if impaired is not None:
        values["impaired"] = impaired
    return write_settings(places.directory / "edge.yaml", values)


def _row(config: SweepConfig, case: Case, kept: _Kept) -> dict[str, Any]:
    """Spreads over the rounds."""
    rounds = kept.of(case)
    row: dict[str, Any] = {**case.as_json(), "rounds": len(rounds)}
    if case.link:
        row["link_text"] = config.links[case.link]
    for name in ("tokens_per_s", "time_per_token_ms_p50", "predicted_tokens_per_s"):
        values = [figures[name] for figures in rounds if name in figures]
        if values:
            row[name] = Spread.of(values)._asdict()
    pairs = [figures for figures in rounds if "predicted_tokens_per_s" in figures]
    if pairs:
        ratios = [one["predicted_tokens_per_s"] / one["tokens_per_s"] for one in pairs]
        row["predicted_vs_measured"] = Spread.of(ratios)._asdict()
    return row


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
