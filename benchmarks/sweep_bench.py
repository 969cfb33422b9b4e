"""What a sweep measures with: clouds, an edge, a calibrator, and one figure after the other."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from privatelora.benchmarks.predict import predict
from privatelora.benchmarks.predict_calibrate import CalibrateSettings, Calibration, Calibrator
from privatelora.benchmarks.predict_choose import transport_round_trip_s
from privatelora.benchmarks.predict_hardware import Link
from privatelora.benchmarks.predict_terms import Scenario
from privatelora.benchmarks.replay import ReplayRequest, traffic
from privatelora.benchmarks.serve import NUM_SKIPPED, STEP_TIMEOUT_S, summarise, write_settings
from privatelora.benchmarks.shards import split_with_adapter
from privatelora.benchmarks.sweep_alone import measure_alone
from privatelora.benchmarks.sweep_config import ALONE, Case, SweepConfig
from privatelora.cli._daemons import Daemon
from privatelora.errors import PrivateLoRAError
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import make_plan
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.device import compute_device

MIN_TOKENS = 8
CALIBRATION_TOKENS = 18
"""Few, because the machine is measured before every link."""
LISTEN = {
    "tcp": "tcp://127.0.0.1:0",
    "shm": "shm://privatelora-sweep-{pid}-{number}",
    "zmq+tcp": "zmq+tcp://127.0.0.1:0",
}

Report = Callable[[str], None]


class SweepBench:
    """Everything that runs while a sweep is measured."""

    def __init__(
        self, config: SweepConfig, directory: Path, stack: ExitStack, report: Report
    ) -> None:
        """Split the model into an empty ``directory``, and start daemons until ``stack`` closes.

        Raises ConfigError or PartitionError, and PrivateLoRAError for what a daemon fails with.
        """
        self._config, self._directory = config, directory
        compute_device(config.device)  # before the work that it would fail after
        report("splitting the model")
        self._plans = self._split()
        clouds = {
            (arrangement, transport): stack.enter_context(self._cloud(arrangement, transport))
            for arrangement in config.arrangements
            for transport in config.transports
        }
        replaying = None
        if any(name not in ALONE for name in config.baselines):
            how = (config.dtype, str(config.num_threads), config.device)
            replaying = stack.enter_context(
                Daemon("privatelora.benchmarks.replay_cloud", self._first_shards(), *how)
            )
        self._edge = stack.enter_context(Daemon("privatelora.benchmarks.sweep_worker"))
        place = directory / "calibration"
        place.mkdir()
        settings = CalibrateSettings(
            config.model,
            place,
            config.dtype,
            config.num_threads,
            CALIBRATION_TOKENS,
            config.device,
        )
        self._calibrator = Calibrator(settings, stack, report)
        self._clouds: dict[tuple[str, str], str] = {
            key: cloud.read_address() for key, cloud in clouds.items()
        }
        self._replay_cloud = "" if replaying is None else replaying.read_address()
        self._edge.read_event("ready")

    def calibrate(self, report: Report) -> Calibration:
        """This machine as predictions take it, measured now."""
        return self._calibrator.measure(report)

    def measure_alone(self, case: Case) -> dict[str, Any]:
        """Tokens/s of a whole model in one place, or why it is ``missing``."""
        try:
            return {
                "tokens_per_s": measure_alone(self._config, self._first_shards(), case.baseline)
            }
        except PrivateLoRAError as error:
            return {"missing": str(error)}

    def measure(self, case: Case, calibration: Calibration) -> dict[str, Any]:
        """Tokens/s over the link of ``case``, and what was predicted of that.

        Raises PrivateLoRAError for what the edge fails with.
        """
        config, link = self._config, self._config.parsed_links()[case.link]
        impaired = _impaired(link)
        emulated = link
        if impaired is not None:
            emulated = replace(link, rtt_s=link.rtt_s + calibration.emulation_s)
        sent = traffic(case.baseline, calibration.shape.config) if case.baseline else None
        predicted = (
            self._predicted(case, calibration, emulated)
            if sent is None
            else 1 / sent.seconds(calibration.measured["unsplit_token"], emulated)
        )
        wanted = round(config.seconds * predicted / case.sessions)
        tokens = NUM_SKIPPED + max(MIN_TOKENS, min(config.tokens, wanted))
        request: dict[str, Any]
        if sent is None:
            request = {
                "kind": "ours",
                "edge": str(self._edge_file(case, impaired)),
                "sessions": case.sessions,
                "prompt_tokens": config.prompt_tokens,
                "tokens": tokens,
            }
        else:
            replayed = ReplayRequest(
                traffic=sent, prompt_tokens=config.prompt_tokens, tokens=tokens
            )
            request = {
                "kind": "replay",
                "cloud": self._replay_cloud,
                "impaired": impaired,
                "replay": replayed.model_dump(),
            }
        self._edge.write_line(json.dumps(request))
        event = self._edge.read_event("decoded", "failed")
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

    def _shards(self, arrangement: str) -> Path:
        """Both shards of an arrangement, and its adapter."""
        return self._directory / f"shards-{list(self._config.arrangements).index(arrangement)}"

    def _first_shards(self) -> Path:
        """Some shards, for what only needs the whole model."""
        return self._shards(next(iter(self._config.arrangements)))

    def _split(self) -> dict[str, Plan]:
        """Shards and an adapter for every arrangement; the plans by their names."""
        config, plans = self._config, {}
        dtype: torch.dtype = getattr(torch, config.dtype)
        with open_checkpoint(config.model) as checkpoint:
            for name, arrangement in config.arrangements.items():
                plans[name] = make_plan(checkpoint.config, **arrangement.model_dump())
                place = self._shards(name)
                adapter_file = place / "adapter.safetensors"
                split_with_adapter(checkpoint, plans[name], place, adapter_file, dtype)
        return plans

    def _cloud(self, arrangement: str, transport: str) -> Daemon:
        config = self._config
        most = max(16, *config.sessions)
        positions = config.prompt_tokens + config.tokens + 64
        number = list(config.arrangements).index(arrangement)
        settings = {
            "listen": LISTEN[transport].format(pid=os.getpid(), number=number),
            "shard": str(self._shards(arrangement) / "cloud"),
            "device": config.device,
            "dtype": config.dtype,
            "num_threads": config.num_threads,
            "max_sessions": most,
            "max_sessions_per_client": most,
            "max_cached_positions": 1024 + most * positions,
        }
        file = self._shards(arrangement) / f"cloud-{transport.replace('+', '-')}.yaml"
        return Daemon("privatelora.cli.serve", write_settings(file, settings))

    def _predicted(self, case: Case, calibration: Calibration, link: Link) -> float:
        """Tokens/s of all sessions, which share the link of their edge."""
        transport_s = transport_round_trip_s(case.transport)
        payload = self._config.payloads[case.payload]
        scenario = Scenario(
            calibration.shape,
            self._plans[case.arrangement],
            Codecs(*(names[0] for names in astuple(payload.preferences()))),
            replace(link, rtt_s=link.rtt_s + transport_s),
            calibration.cloud,
            calibration.edge,
            sessions=case.sessions,
            context=self._config.prompt_tokens + self._config.tokens // 2,
        )
        computed = predict(scenario)
        wire_s = max(link.up_s(computed.nbytes.up), link.down_s(computed.nbytes.down))
        return min(computed.aggregate_tokens_per_s, 1 / wire_s if wire_s else math.inf)

    def _edge_file(self, case: Case, impaired: dict[str, Any] | None) -> Path:
        shards = self._shards(case.arrangement)
        values = {
            "cloud": self._clouds[case.arrangement, case.transport],
            "shard": str(shards / "edge"),
            "adapter": str(shards / "adapter.safetensors"),
            "dtype": self._config.dtype,
            "num_threads": self._config.num_threads,
            "payload": self._config.payloads[case.payload].model_dump(mode="json"),
            "step_timeout_s": STEP_TIMEOUT_S,
        }
        if impaired is not None:
            values["impaired"] = impaired
        return write_settings(self._directory / "edge.yaml", values)


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
