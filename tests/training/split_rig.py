"""Split training in one process: a cloud, a trainer at it, and training in one place beside it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.nn import functional as F

from privatelora.partition.models.families import tensor_names
from privatelora.partition.plan import Target
from privatelora.partition.shard import Shard
from privatelora.runtime.cloud_link import LinkSettings
from privatelora.runtime.cloud_service import CloudLimits, CloudService
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.training_session import TrainingLimits
from privatelora.training.adapted import AdaptedProjections
from privatelora.training.split.client import SplitClient
from privatelora.training.split.model import SplitCausalLM
from privatelora.transports.base import Connection, Handler, Limits
from privatelora.transports.registry import listen
from tests.partition.tiny import tiny_model
from tests.unit.world import CPU, FP32, PRINTS, ROOMY, World, only

TRAINING = replace(ROOMY, training=TrainingLimits(max_rows=512, max_sessions=4))
PATIENCE_S = 30.0
TASKS_OF_LINK = ("privatelora-training-keepalive", "privatelora-training-reader")

Gradients = dict[tuple[int, Target], torch.Tensor]
"""By layer and target."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Batch:
    """Tokens (B, T) padded on the left, and for each the one that follows, or -100."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    keep: int = 0
    """As ``logits_to_keep``; the loss is on these positions."""

    @property
    def num_rows(self) -> int:
        return int(self.attention_mask.sum())

    def loss(self, model: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        logits = model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            logits_to_keep=self.keep,
        ).logits
        labels = self.labels[:, -self.keep :]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def batch_of(lengths: Sequence[int], *, keep: int = 0, seed: int = 0) -> Batch:
    """Random tokens in sequences of ``lengths``."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    positions = torch.arange(longest)
    mask = torch.stack([positions >= longest - length for length in lengths])
    tokens = torch.randint(3, 199, (len(lengths), longest + 1), generator=generator)
    labels = torch.where(mask, tokens[:, 1:], -100)
    return Batch(torch.where(mask, tokens[:, :-1], 0), mask.long(), labels, keep)


class Central:
    """The transformers model with M inside it."""

    def __init__(self, split: World, family: str) -> None:
        self.model = tiny_model(family).requires_grad_(False)
        frozen = set(tensor_names(split.config))
        basis = {name: tensor for name, tensor in split.tensors.items() if name not in frozen}
        self._projections = AdaptedProjections(split.plan, basis, dtype=torch.float32)
        self._projections.attach(self.model.model)
        self._projections.load_weights(split.weights)

    def gradients(self, *batches: Batch) -> Gradients:
        """Of the sum of the losses."""
        self._projections.zero_grad()
        for batch in batches:
            batch.loss(self.model).backward()  # type: ignore[no-untyped-call]
        return _gradients(self._projections.lora_M)


class Trainer:
    """A trainer with the cloud it trains at, both on the loop of its client's thread.

    ``connections``: all that it made, the cloud's ends.
    """

    def __init__(
        self, split: World, service: CloudService, client: SplitClient, settings: LinkSettings
    ) -> None:
        self.split = split
        self.service = service
        """What connections that come get to."""
        self.client = client
        self.client_settings = settings
        self.connections: list[Connection] = []
        # Not from files: writing and hashing them would take most of a test's time.
        manifest = SimpleNamespace(
            config=split.config, plan=split.plan, fingerprints=astuple(PRINTS)
        )
        shard = SimpleNamespace(
            manifest=manifest, tokenizer_dir=Path(), load=lambda *_: split.shard("edge")
        )
        self.model = SplitCausalLM(cast(Shard, shard), client, CPU, torch.float32)
        self.load(split.weights)

    def load(self, weights: Mapping[tuple[int, Target], torch.Tensor]) -> None:
        """Make these M."""
        with torch.no_grad():
            for (layer, target), weight in weights.items():
                self.model.lora_M[f"{layer}_{target}"].copy_(weight)

    def gradients(self, *batches: Batch) -> Gradients:
        """Of the sum of the losses."""
        self.model.zero_grad()
        for batch in batches:
            batch.loss(self.model).backward()  # type: ignore[no-untyped-call]
        return self.found()

    def found(self) -> Gradients:
        """Gradients that were summed up since they were zeroed."""
        return _gradients(self.model.lora_M)

    def num_frames(self) -> tuple[int, int]:
        """Frames that the cloud received and sent on the last connection."""
        counters = self.connections[-1].counters
        return counters.received_frames, counters.sent_frames

    async def handle(self, connection: Connection) -> None:
        self.connections.append(connection)
        await self.service.handle(connection)


@contextmanager
def training(
    split: World,
    limits: CloudLimits = TRAINING,
    *,
    codecs: Codecs = FP32,
    wrap: Callable[[Handler], Handler] = lambda handler: handler,
    listening: bool = True,
    patience_s: float = PATIENCE_S,
    **settings: Any,
) -> Iterator[Trainer]:
    """A trainer at a cloud of ``split``. Nothing may be left of either: no task, no thread.

    ``wrap``: what stands before the cloud.
    """
    threads = set(threading.enumerate())
    address = f"inproc://training-{next(_numbers)}"
    link = LinkSettings(address, only(codecs), **settings)
    client = SplitClient(split.config, split.plan, PRINTS, link, patience_s, CPU)
    trainer = Trainer(split, split.service(limits), client, link)

    async def names_of_tasks() -> list[str]:
        return [task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}]

    listener = client.thread.run(listen(address, wrap(trainer.handle), Limits()))
    if not listening:
        client.thread.run(listener.aclose())
    try:
        yield trainer
    finally:
        client.thread.run(listener.aclose())
        left = client.thread.run(names_of_tasks())
        trainer.model.close()
    # Of a link that is still there, and goes with the model.
    assert sorted(left) in ([], ["privatelora-training-keepalive"], sorted(TASKS_OF_LINK))
    assert set(threading.enumerate()) <= threads


def _gradients(parameters: Any) -> Gradients:
    found: Gradients = {}
    for name, parameter in parameters.items():
        layer, target = name.split("_")
        found[int(layer), target] = parameter.grad.clone()
    return found


def assert_same_gradients(found: Gradients, expected: Gradients, tolerance: float = 1e-5) -> None:
    """Equal in each matrix but for ``tolerance`` of its largest gradient."""
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert largest > 0, f"{key}: a gradient that is zero shows nothing"
        difference = float((found[key] - gradient).abs().max()) / largest
        assert difference <= tolerance, f"{key}: {difference:.2g} of the largest"
