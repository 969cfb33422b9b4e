"""How much quality do few round trips cost? The same training for every arrangement and method.

Method. Every row of the table starts from the same model and learns two tasks at once, one of
reasoning and one of private facts, from the same examples in the same order, held back from
forgetting in the same way, with the learning rate that did best for it in a short run. A row that
is measured is written down, so that a run that was cut off goes on with the next.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from privatelora.benchmarks.arrangement_rows import (
    Row,
    WireCost,
    predicted_tokens_per_s,
    table_rows,
    wire_cost,
)
from privatelora.benchmarks.measure import machine_facts
from privatelora.errors import ConfigError
from privatelora.partition.files import write_atomic
from privatelora.runtime.device import compute_device
from privatelora.runtime.unsplit import open_unsplit
from privatelora.training.base_model import BaseModel, load_base_model
from privatelora.training.data.collate import collate
from privatelora.training.data.config import EncodingConfig
from privatelora.training.data.encode import encode_all
from privatelora.training.data.examples import Encoded, Example
from privatelora.training.data.facts import fact_examples
from privatelora.training.data.procedural import reasoning_examples
from privatelora.training.data.scoring import score_generated
from privatelora.training.general import GeneralReferences, prepare_retention
from privatelora.training.methods import PrivateLoraMethod, State, Trainable, make_trainable
from privatelora.training.retention import RetentionConfig, measure_retention
from privatelora.training.run import Prepared, make_trainer
from privatelora.training.trainer import ShowProgress, answer_loss

Report = Callable[[str], None]

RTT_MS = 20.0
MBPS = 60.0
"""The link that rates are predicted for: the paper's slower direction, and the distance of 5G."""

VALIDATION_SIZE = 32
"""Examples of each task that a learning rate is chosen by; neither trained on nor scored."""


ENCODING = EncodingConfig(system="")
"""As a chat, without the words that models put in front of one by themselves: they would be most
of these short examples."""


@dataclass(frozen=True)
class ArrangementSettings:
    """What is trained and how long. ``directory``: where rows are kept."""

    directory: Path
    model: str
    steps: int = 100
    tune_steps: int = 16
    batch_size: int = 6
    num_facts: int = 20
    num_sums: int = 1000
    num_held_out: int = 200
    """Questions of the reasoning task; of the facts there are ten to each."""
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    rows: tuple[str, ...] = ()
    """Names of the rows to measure; none: all."""
    retention: RetentionConfig = field(
        default_factory=lambda: RetentionConfig(
            replay_share=0.2, num_held_out=40, max_answer_tokens=24
        )
    )

    def fingerprint(self) -> dict[str, Any]:
        """What rows of one table have in common."""
        return {
            "model": self.model,
            "steps": self.steps,
            "tune_steps": self.tune_steps,
            "batch_size": self.batch_size,
            "num_facts": self.num_facts,
            "num_sums": self.num_sums,
            "num_held_out": self.num_held_out,
            "seed": self.seed,
            "dtype": self.dtype,
            "retention": self.retention.model_dump(mode="json"),
        }


def sums(size: int, seed: int) -> list[Example]:
    """Two numbers of two digits, to be added or subtracted, as reasoning-gym asks for them."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
    # Of so few questions some are drawn twice, and kept once.
    return reasoning_examples("chain_sum", 2 * size, seed, options)[:size]


class Tasks:
    """The examples of both tasks, apart: trained on, for choosing a learning rate, and scored."""

    def __init__(self, settings: ArrangementSettings) -> None:
        draw = settings.seed
        self.held_out = {
            "sums": sums(settings.num_held_out, draw + 1),
            "facts": fact_examples(settings.num_facts, draw, "held-out"),
        }
        # Questions are few enough that seeds meet: what is scored comes nowhere else.
        scored = {example.question for example in self.held_out["sums"]}
        others = [
            example
            for example in sums(2 * settings.num_sums + 2 * VALIDATION_SIZE, draw + 2)
            if example.question not in scored
        ]
        facts = fact_examples(settings.num_facts, draw, "train")
        self.train = {"sums": others[VALIDATION_SIZE:][: settings.num_sums], "facts": facts}
        # A phrasing of every fact: how well it is learnt. Unseen ones are for the score.
        self.validation = {
            "sums": others[:VALIDATION_SIZE],
            "facts": facts[:: max(1, len(facts) // VALIDATION_SIZE)],
        }


class Bench:
    """What all rows share."""

    def __init__(self, settings: ArrangementSettings, report: Report) -> None:
        self.settings = settings
        self.report = report
        self.tasks = Tasks(settings)
        self.device = compute_device(settings.device)

    def load(self) -> BaseModel:
        """The model as published, once more."""
        settings = self.settings
        return load_base_model(settings.model, getattr(torch, settings.dtype), self.device)

    @cached_property
    def base(self) -> BaseModel:
        """A model that stays as it is."""
        return self.load()

    @cached_property
    def general(self) -> GeneralReferences:
        """General text, and what the base model makes of it."""
        base = self.base
        return prepare_retention(
            base.model,
            base.tokenizer,
            self.settings.retention,
            model_fingerprint=base.fingerprint,
            max_positions=base.config.max_positions,
            cache=self.settings.directory,
            progress=lambda what, done, total: self.report(f"{what} ({done} of {total})"),
        )

    @cached_property
    def rows(self) -> list[Encoded]:
        """Both tasks in equal parts: the smaller is repeated."""
        parts = [self.encode(examples) for examples in self.tasks.train.values()]
        longest = max(map(len, parts))
        return [part[i % len(part)] for i in range(longest) for part in parts]

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Token ids."""
        base = self.base
        return encode_all(
            examples, base.tokenizer, ENCODING, max_positions=base.config.max_positions
        )

    def prepare(self, row: Row) -> Prepared:
        """A fresh model, ready to train as ``row`` says."""
        if row.method is None:
            raise ConfigError("the base model is not trained")
        base = self.load()
        trainable = make_trainable(base, row.method)
        return Prepared(trainable, base.tokenizer, base.fingerprint, base.config.max_positions)

    def train(self, prepared: Prepared, learning_rate: float, steps: int, label: str) -> None:
        """Train for ``steps``, the learning rate falling to zero within them."""
        settings = self.settings
        with tempfile.TemporaryDirectory() as directory:
            trainer = make_trainer(
                prepared,
                self.rows,
                general=self.general,
                retention=settings.retention,
                arguments={
                    "output_dir": directory,
                    "learning_rate": learning_rate,
                    "max_steps": steps,
                    "per_device_train_batch_size": settings.batch_size,
                    "lr_scheduler_type": "cosine",
                    "warmup_steps": 0.05,
                    "logging_steps": max(1, steps // 10),
                    "save_strategy": "no",
                    "report_to": [],
                    "disable_tqdm": True,
                    "seed": settings.seed,
                    "use_cpu": self.device.type == "cpu",
                    "dataloader_pin_memory": False,
                },
            )
            trainer.add_callback(ShowProgress(partial(self._tell, label, max(1, steps // 8))))
            trainer.train()

    def _tell(self, label: str, every: int, what: str, done: int, total: int) -> None:
        if done % every == 0:
            self.report(f"{label}: {what}, step {done} of {total}")

    @torch.no_grad()
    def validation_loss(self, trainable: Trainable) -> float:
        """Mean over both tasks of the loss on answers, and the divergence on general text.

        A learning rate that learns by forgetting is none to choose.
        """
        model, losses = trainable.model, []
        model.eval()
        for examples in self.tasks.validation.values():
            encoded = self.encode(examples)
            batch = collate(encoded, pad_token_id=self.base.tokenizer.pad_token_id or 0)
            batch = {k: v.to(self.device) if k != "logits_to_keep" else v for k, v in batch.items()}
            meant = batch.pop("reference") < 0
            labels = batch.pop("labels")
            losses.append(float(answer_loss(model(**batch).logits, labels, meant)))
        retention = measure_retention(model, self.general.held_out)
        return sum(losses) / len(losses) + self.settings.retention.kl_weight * retention.kl


def measure_arrangements(settings: ArrangementSettings, report: Report) -> dict[str, Any]:
    """Measure the rows that are not there yet; return the table of all that are wanted.

    Raises ConfigError for an unknown row, or where rows of other settings are kept.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    bench = Bench(settings, report)
    rows = _chosen(table_rows(bench.base.config.num_layers), settings.rows)
    shared = _shared(bench)
    measured: list[list[dict[str, Any]]] = []
    for number, row in enumerate(rows):
        file = settings.directory / f"{row.name}.json"
        if file.is_file():
            measured.append(json.loads(file.read_text()))
            continue
        label = f"row {number + 1} of {len(rows)}, {row.name}"
        measured.append(_measure(bench, row, label))
        write_atomic(file, json.dumps(measured[-1], indent=2).encode())
    return {
        "benchmark": "arrangements",
        "method": __doc__,
        "settings": settings.fingerprint(),
        "link": {"rtt_ms": RTT_MS, "mbps": MBPS},
        "machine": machine_facts(),
        **shared,
        "rows": [_with_prediction(entry, shared["compute_s"]) for one in measured for entry in one],
    }


def _with_prediction(entry: dict[str, Any], compute_s: float) -> dict[str, Any]:
    """What a row sends is kept with it; how fast a token is computed belongs to all rows."""
    cost = WireCost(entry["round_trips_per_token"], entry["bytes_per_token"])
    rate = predicted_tokens_per_s(cost, compute_s, RTT_MS, MBPS)
    return {**entry, "predicted_tokens_per_s": rate}


def _chosen(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    known = {row.name: row for row in rows}
    for name in names:
        if name not in known:
            raise ConfigError(f"--rows: there is no row {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in names or known]


def _shared(bench: Bench) -> dict[str, Any]:
    """What belongs to no row; made once, and checked to be of these settings after that."""
    file = bench.settings.directory / "shared.json"
    of = bench.settings.fingerprint()
    if file.is_file():
        shared: dict[str, Any] = json.loads(file.read_text())
        if shared["of"] != of:
            different = [key for key in of if shared["of"].get(key) != of[key]]
            raise ConfigError(
                f"{file.parent} holds rows of other settings ({', '.join(different)}); give those, "
                "or another folder"
            )
        return shared
    bench.report("time of one decoded token")
    shared = {"of": of, "compute_s": decode_s(bench.settings.model)}
    write_atomic(file, json.dumps(shared, indent=2).encode())
    return shared


def _measure(bench: Bench, row: Row, label: str) -> list[dict[str, Any]]:
    """Train one row, and ask it."""
    settings = bench.settings
    rate, num_parameters = None, 0
    if row.method is None:
        prepared = Prepared(_Untrained(bench.base), bench.base.tokenizer, bench.base.fingerprint, 0)
    else:
        rate = _learning_rate(bench, row, label)
        prepared = bench.prepare(row)
        num_parameters = prepared.trainable.num_parameters
        started = time.monotonic()
        bench.train(prepared, rate, settings.steps, f"{label}, {rate:g}")
        bench.report(f"{label}: trained in {time.monotonic() - started:.0f} s")
        if isinstance(row.method, PrivateLoraMethod):
            prepared.trainable.save(settings.directory / row.name)
    retention = measure_retention(prepared.trainable.model, bench.general.held_out)
    cost = wire_cost(row.method, bench.base.config)
    entries = []
    for task, examples in bench.tasks.held_out.items():
        bench.report(f"{label}: asking {len(examples)} {task}")
        score = score_generated(
            prepared.trainable.model,
            bench.base.tokenizer,
            examples,
            settings=ENCODING,
            max_new_tokens=16,
        )
        entries.append(
            {
                "row": row.name,
                "method": row.label,
                "task": task,
                **score.summary(),
                "retention": retention.agreement,
                "retention_low": retention.agreement_low,
                "retention_high": retention.agreement_high,
                "kl_to_base": retention.kl,
                "trainable_parameters": num_parameters,
                "round_trips_per_token": cost.round_trips,
                "bytes_per_token": cost.nbytes,
                "learning_rate": rate,
                "steps": settings.steps if row.method is not None else 0,
            }
        )
    return entries


def _learning_rate(bench: Bench, row: Row, label: str) -> float:
    """The best of those tried for a row, or for the one it is tuned as; kept in a file."""
    rows = {other.name: other for other in table_rows(bench.base.config.num_layers)}
    row = rows[row.tuned_as or row.name]
    file = bench.settings.directory / f"rates-{row.name}.json"
    if not file.is_file():
        losses = {}
        for rate in row.learning_rates:
            prepared = bench.prepare(row)
            bench.train(prepared, rate, bench.settings.tune_steps, f"{label}, trying {rate:g}")
            losses[str(rate)] = bench.validation_loss(prepared.trainable)
        write_atomic(file, json.dumps(losses, indent=2).encode())
    losses = json.loads(file.read_text())
    return float(min(losses, key=lambda rate: _or_infinite(losses[rate])))


class _Untrained(Trainable):
    """The model as it is."""

    learning_rate = 0.0

    def __init__(self, base: BaseModel) -> None:
        self.model = base.model

    def save(self, directory: Path, state: State | None = None) -> dict[str, Path]:
        """There is nothing to write."""
        return {}

    def load(self, directory: Path) -> None:
        """Nor to read."""


def _or_infinite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def decode_s(model: str, num_tokens: int = 48) -> float:
    """Seconds for one decoded token on this machine without any network: the median."""
    text_model = open_unsplit(model)

    async def decode() -> float:
        sequence = await text_model.model.open_sequence(num_tokens + 1)
        times = []
        for position in range(num_tokens):
            started = time.perf_counter()
            await sequence.forward([1 + position], position, "last")
            times.append(time.perf_counter() - started)
        return statistics.median(times[8:])

    return asyncio.run(decode())
