"""One method of training in a process of its own, measured on request over lines of JSON.

    -> {"first": 3, "steps": 2}
    <- {"event": "trained", "seconds": 3.1, "loss": 4.2, "bytes_up": 0, "bytes_down": 0}

``first``: the number of the first batch, which decides what is in it, so that all workers train
on the same ones. ``loss``: of the last of these batches, before it changed anything.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from privatelora.errors import PrivateLoRAError
from privatelora.runtime.config import load_edge_config
from privatelora.training.base_model import load_base_model
from privatelora.training.data.collate import IGNORED, collate
from privatelora.training.data.examples import Encoded
from privatelora.training.methods import MethodConfig, Trainable, make_trainable
from privatelora.training.split.model import SplitCausalLM
from privatelora.training.split.open import open_split_model
from privatelora.training.split.trainable import TrainableSplit
from privatelora.yaml_file import read_yaml


class WorkerConfig(BaseModel):
    """What to train; written by the benchmark that starts the worker."""

    model_config = ConfigDict(extra="forbid")

    model: str
    method: MethodConfig
    edge_config: Path | None = None
    """Of split training; its shard then has the method's arrangement."""
    batch_size: int
    tokens: int
    vocab_size: int
    num_threads: int


class TrainRequest(BaseModel):
    """How many steps, and the batch of the first."""

    model_config = ConfigDict(extra="forbid")

    first: int
    steps: int


class Worker:
    """A model, its optimiser, and the batches."""

    def __init__(self, config: WorkerConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._config = config
        self._split: SplitCausalLM | None = None
        self._trainable = self._open()
        self._model: Any = self._trainable.model
        self._model.train()
        self._optimizer = torch.optim.AdamW(
            [parameter for parameter in self._model.parameters() if parameter.requires_grad],
            lr=self._trainable.learning_rate,
            weight_decay=0.0,
            fused=True,
        )

    def facts(self) -> dict[str, int]:
        """What does not depend on time."""
        round_trips = 0
        if self._split is not None:  # as many on the way back as on the way there
            round_trips = 2 * (1 + len(self._split.plan.wire_points))
        return {
            "trainable_parameters": self._trainable.num_parameters,
            "round_trips_per_step": round_trips,
        }

    def train(self, request: TrainRequest) -> dict[str, Any]:
        """Train on some batches, which are made before the clock starts."""
        batches = [self._batch(request.first + number) for number in range(request.steps)]
        sent, received = self._traffic()
        started = time.perf_counter()
        losses = [self._step(batch) for batch in batches]
        seconds = time.perf_counter() - started
        sent_since, received_since = self._traffic()
        return {
            "seconds": seconds,
            "loss": losses[-1],
            "bytes_up": sent_since - sent,
            "bytes_down": received_since - received,
        }

    def _open(self) -> Trainable:
        config = self._config
        if config.edge_config is not None:
            self._split = open_split_model(load_edge_config(config.edge_config))
            return TrainableSplit(self._split)
        base = load_base_model(config.model, torch.float32)
        base.model.config.use_cache = False  # as the Trainer does
        return make_trainable(base, config.method)

    def _step(self, batch: dict[str, Any]) -> float:
        outputs = self._model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=batch["logits_to_keep"],
        )
        # The Trainer's loss without the Trainer, which takes seconds to import.
        chosen = batch["labels"] != IGNORED
        loss = F.cross_entropy(outputs.logits[chosen].float(), batch["labels"][chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _batch(self, number: int) -> dict[str, Any]:
        config = self._config
        generator = torch.Generator().manual_seed(number)
        shape = config.batch_size, config.tokens
        rows = torch.randint(config.vocab_size, shape, generator=generator).tolist()
        examples = [Encoded(tuple(row), num_answer=len(row) - 1) for row in rows]
        return collate(examples, pad_token_id=0, loss_on="all")

    def _traffic(self) -> tuple[int, int]:
        return (0, 0) if self._split is None else self._split.client.traffic


def _say(event: str, **values: object) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def main() -> None:
    """Load what the YAML file named on the command line says and serve requests."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        worker = Worker(read_yaml(Path(sys.argv[1]), WorkerConfig))
        _say("ready", **worker.facts())
        for line in sys.stdin:
            _say("trained", **worker.train(TrainRequest.model_validate_json(line)))
    except PrivateLoRAError as error:
        _say("failed", error=str(error))


if __name__ == "__main__":
    main()
