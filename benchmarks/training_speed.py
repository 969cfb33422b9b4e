"""How fast training is: full, LoRA and PrivateLoRA in one place, and PrivateLoRA split, in one run.

Method. Every contender trains the same model in float32 on the same batches of random tokens, the
loss taken on every token, in a process of its own with ``num_threads`` threads. A step is forward,
backward and AdamW, fused as in the Trainer's default; the Trainer itself and its clipping of
gradients are left out. The first ``WARMUP_STEPS`` are not counted: they make the optimiser's state,
and connect the split ones. Then the contenders take turns for ``rounds`` rounds of ``steps`` steps
each, while the others wait for their turn. Ratios are of the same round, to the first contender
that was chosen: full fine-tuning, without it LoRA on every linear layer.

A split contender is two processes: a trainer, which has ``num_threads`` too, and its cloud,
``privatelora-serve`` with ``num_threads`` of its own. So the frozen layers have the same processors
split as in one place, and the trainer others if ``num_threads`` is half of them or less; this helps
little, for the two hardly ever compute at once. They talk over TCP on the loopback interface, at a
distance that is emulated on the trainer's connection (``impaired``, half in each direction), in
fp32, as split training does where nothing else is set. One cloud serves one arrangement at all
distances, a trainer each.

The basis is random: it decides what is learnt, and not how fast. As an arrangement begins with the
same M on the same basis in one place and split, both must arrive at the same loss. It is in the
result: that of the last batch, before it changed anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from privatelora.benchmarks.load_usage import Peak
from privatelora.benchmarks.measure import Spread, machine_facts, paired_ratios
from privatelora.benchmarks.serve import write_settings
from privatelora.benchmarks.training_speed_rows import (
    Contender,
    TrainingSpeedSettings,
    chosen_contenders,
)
from privatelora.benchmarks.training_speed_worker import TrainRequest, WorkerConfig
from privatelora.cli._daemons import Daemon
from privatelora.errors import ConfigError
from privatelora.partition.checkpoint import Checkpoint, open_checkpoint
from privatelora.partition.split import make_basis, partition_checkpoint
from privatelora.training.methods import MethodConfig, PrivateLoraMethod

WORKER = "privatelora.benchmarks.training_speed_worker"
WARMUP_STEPS = 1
STEP_TIMEOUT_S = 3600.0
"""Slow machines are to be measured too."""

Report = Callable[[str], None]


class _Cloud(NamedTuple):
    """Of one arrangement."""

    daemon: Daemon
    address: str
    directory: Path


@dataclass
class _Entered:
    """A contender whose processes run, and what was measured of it."""

    contender: Contender
    trainer: Daemon
    cloud: _Cloud | None
    facts: dict[str, Any] = field(default_factory=dict)
    """What the trainer said when it was ready."""
    rates: list[float] = field(default_factory=list)
    peaks_mib: dict[str, float] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    """What the trainer said of the last round."""


def measure_training_speed(settings: TrainingSpeedSettings, report: Report) -> dict[str, Any]:
    """Measure all contenders that were chosen, in turns.

    Raises ConfigError for settings that cannot be, and PrivateLoRAError for what a contender
    fails with.
    """
    chosen = chosen_contenders(settings)
    with ExitStack() as stack:
        entered = _enter(settings, chosen, stack, report)
        for one in entered:
            report(f"first steps: {one.contender.title}")
            _train(settings, one, TrainRequest(first=0, steps=WARMUP_STEPS))
        for number in range(settings.rounds):
            first = WARMUP_STEPS + number * settings.steps
            request = TrainRequest(first=first, steps=settings.steps)
            for one in entered:
                report(f"round {number + 1} of {settings.rounds}: {one.contender.title}")
                one.rates.append(_train(settings, one, request))
    return {
        "benchmark": "training",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {
            "model": settings.model,
            "batch_size": settings.batch_size,
            "tokens": settings.tokens,
            "steps": settings.steps,
            "rounds": settings.rounds,
            "warmup_steps": WARMUP_STEPS,
            "num_threads": settings.num_threads,
        },
        "baseline": entered[0].contender.label,
        "rows": [_row(settings, one, entered[0]) for one in entered],
    }


def _enter(
    settings: TrainingSpeedSettings,
    contenders: Sequence[Contender],
    stack: ExitStack,
    report: Report,
) -> list[_Entered]:
    """Start the processes of all contenders."""
    with open_checkpoint(settings.model) as checkpoint:
        config = checkpoint.config
        if settings.tokens > config.max_positions:
            raise ConfigError(
                f"--tokens {settings.tokens}: the model's context is {config.max_positions}"
            )
        for contender in contenders:  # before the work
            if isinstance(contender.method, PrivateLoraMethod):
                contender.method.plan_for(config)
        clouds: dict[MethodConfig, _Cloud] = {}
        entered = []
        for number, contender in enumerate(contenders):
            report(f"starting: {contender.title}")
            cloud, edge_config, method = None, None, contender.method
            if contender.rtt_ms is not None and isinstance(method, PrivateLoraMethod):
                if method not in clouds:
                    clouds[method] = _start_cloud(settings, method, checkpoint, stack)
                cloud = clouds[method]
                edge_config = write_settings(
                    cloud.directory / f"edge-{number}.yaml",
                    _edge_settings(settings, cloud.address, contender.rtt_ms),
                )
            worker = WorkerConfig(
                model=settings.model,
                method=method,
                edge_config=edge_config,
                batch_size=settings.batch_size,
                tokens=settings.tokens,
                vocab_size=config.vocab_size,
                num_threads=settings.num_threads,
            )
            file = settings.directory / f"worker-{number}.yaml"
            write_settings(file, worker.model_dump(mode="json"))
            trainer = stack.enter_context(
                # The model is on this machine by now.
                Daemon(WORKER, file, environment={"HF_HUB_OFFLINE": "1"})
            )
            entered.append(_Entered(contender, trainer, cloud))
    for one in entered:  # which load side by side: most of it is importing
        report(f"loading: {one.contender.title}")
        one.facts = one.trainer.read_event("ready")
    return entered


def _start_cloud(
    settings: TrainingSpeedSettings,
    method: PrivateLoraMethod,
    checkpoint: Checkpoint,
    stack: ExitStack,
) -> _Cloud:
    """Split the model as ``method`` says, and serve it."""
    place = settings.directory / f"every-{method.every}-rank-{method.rank_up}"
    plan = method.plan_for(checkpoint.config)
    place.mkdir()
    partition_checkpoint(
        checkpoint,
        place / "shards",
        plan,
        make_basis(method.basis, plan, checkpoint, seed=method.seed),
        dtype=torch.float32,
    )
    config = {
        "listen": "tcp://127.0.0.1:0",
        "shard": "shards/cloud",
        "num_threads": settings.num_threads,
        "training": {
            "max_rows": settings.batch_size * settings.tokens,
            "max_sessions": 1 + len(settings.rtts_ms),
        },
    }
    file = write_settings(place / "cloud.yaml", config)
    daemon = stack.enter_context(Daemon("privatelora.cli.serve", file))
    return _Cloud(daemon, daemon.read_address(), place)


def _edge_settings(settings: TrainingSpeedSettings, address: str, rtt_ms: float) -> dict[str, Any]:
    config: dict[str, Any] = {
        "cloud": address,
        "shard": "shards/edge",
        "num_threads": settings.num_threads,
        "step_timeout_s": STEP_TIMEOUT_S,
    }
    if rtt_ms:
        # Each its own: of one that comes twice YAML would write an alias, which is not read.
        config["impaired"] = {way: {"delay_ms": rtt_ms / 2} for way in ("up", "down")}
    return config


def _train(settings: TrainingSpeedSettings, one: _Entered, request: TrainRequest) -> float:
    """Let a contender train; return its tokens/s."""
    processes = {"trainer": one.trainer}
    if one.cloud is not None:
        processes["cloud"] = one.cloud.daemon
    with ExitStack() as watching:
        peaks = {name: watching.enter_context(Peak(of.pid)) for name, of in processes.items()}
        one.trainer.write_line(request.model_dump_json())
        one.last = one.trainer.read_event("trained")
    for name, peak in peaks.items():
        one.peaks_mib[name] = max(one.peaks_mib.get(name, 0.0), peak.rss_mib)
    tokens = request.steps * settings.batch_size * settings.tokens
    return tokens / float(one.last["seconds"])


def _row(settings: TrainingSpeedSettings, one: _Entered, baseline: _Entered) -> dict[str, Any]:
    contender = one.contender
    return {
        "row": contender.name,
        "method": contender.label,
        "mode": contender.mode,
        "rtt_ms": contender.rtt_ms,
        "tokens_per_s": {**Spread.of(one.rates)._asdict(), "runs": one.rates},
        "ratio": paired_ratios(one.rates, baseline.rates)._asdict(),
        "trainable_parameters": one.facts["trainable_parameters"],
        "round_trips_per_step": one.facts["round_trips_per_step"],
        "bytes_per_step": {
            way: one.last[f"bytes_{way}"] // settings.steps for way in ("up", "down")
        },
        "peak_memory_mib": one.peaks_mib,
        "loss": one.last["loss"],
    }
