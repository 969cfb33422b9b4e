"""A tiny model split in memory: both sides of it, and the unsplit model to compare with."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import torch

from privatelora.partition.adapter import init_adapter
from privatelora.partition.basis import RandomBasis
from privatelora.partition.layout import ShardRole, shard_shapes
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import from_hf_config, tensor_names
from privatelora.partition.plan import Plan, Target
from privatelora.partition.plan_file import make_plan
from privatelora.runtime.batch_runner import Observer
from privatelora.runtime.client_tokens import Tokens
from privatelora.runtime.cloud_link import CloudLink, LinkSettings
from privatelora.runtime.cloud_service import CloudLimits, CloudService
from privatelora.runtime.codecs import CodecPreferences, Codecs
from privatelora.runtime.engine import Engine
from privatelora.runtime.exchange import PrivateMatrices
from privatelora.runtime.language_model import Ends, LanguageModel, UnsplitModel
from privatelora.runtime.split_model import CloudAccess, EdgeParts, SplitModel
from privatelora.runtime.wire.messages import Fingerprints
from privatelora.transports.base import Handler, Limits
from privatelora.transports.registry import listen
from tests.partition.tiny import tiny_model

CPU = torch.device("cpu")
FP32 = Codecs("fp32", "fp32", "fp32", "fp32")
FP16 = Codecs("fp16", "fp16", "fp16", "fp16")
ROOMY = CloudLimits(
    max_sessions=8,
    max_positions=128,
    max_cached_positions=1024,
    max_frame_nbytes=2**20,
    max_waiting=0,
)
PRINTS = Fingerprints("a" * 64, "b" * 64, "c" * 64)
_numbers = itertools.count()


def only(codecs: Codecs) -> CodecPreferences:
    """Accept nothing but ``codecs``."""
    return CodecPreferences(*((name,) for name in astuple(codecs)))


class OwnModel(SplitModel):
    """With a connection of its own."""

    def __init__(
        self, parts: EdgeParts, access: CloudAccess, matrices: PrivateMatrices | None
    ) -> None:
        super().__init__(parts, access, matrices)
        self.access = access
        self.parts = parts

    async def link(self) -> CloudLink:
        return await self.access.link()

    async def aclose(self) -> None:
        await self.access.aclose()


@dataclass(frozen=True)
class World:
    """A model, how it is split, and an adapter that is not zero."""

    config: DecoderConfig
    plan: Plan
    tensors: Mapping[str, torch.Tensor]
    """Frozen weights and basis, both sides'; an engine gets a dict of its own to take from."""
    weights: Mapping[tuple[int, Target], torch.Tensor]

    def shard(self, role: ShardRole) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in shard_shapes(self.config, self.plan, role)}

    def matrices(self) -> PrivateMatrices:
        return PrivateMatrices(self.plan, self.weights)

    def ends(self) -> Ends:
        return Ends(self.config, dict(self.tensors))

    def engine(
        self,
        layers: range | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> Engine:
        """Of all layers unless told."""
        tensors = {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}
        layers = range(self.config.num_layers) if layers is None else layers
        return Engine(self.config, self.plan, layers, tensors, device, dtype)

    def unsplit(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device = CPU
    ) -> UnsplitModel:
        tensors = {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}
        engine = self.engine(dtype=dtype, device=device)
        return UnsplitModel(Ends(self.config, tensors), engine, self.matrices())

    def service(
        self,
        limits: CloudLimits = ROOMY,
        trace: Observer | None = None,
        tokens: Tokens | None = None,
    ) -> CloudService:
        plan = self.plan
        engine = Engine(
            self.config, plan, plan.cloud_layers, self.shard("cloud"), CPU, torch.float32
        )
        return CloudService(engine, plan, PRINTS, limits, trace, tokens=tokens)

    def split(
        self,
        address: str,
        *,
        fingerprints: Fingerprints = PRINTS,
        codecs: Codecs = FP32,
        max_positions: int = 128,
        max_step_positions: int = 32,
        **settings: Any,
    ) -> OwnModel:
        parts = EdgeParts(self.config, self.plan, self.shard("edge"), CPU, torch.float32)
        access = CloudAccess(
            parts,
            fingerprints,
            LinkSettings(address, only(codecs), **settings),
            max_positions,
            max_step_positions,
        )
        return OwnModel(parts, access, self.matrices())


@cache
def world(family: str = "llama", **plan_options: Any) -> World:
    """A tiny model of ``family`` with ranks of 8, one exchange per layer unless told."""
    model = tiny_model(family)
    model.config.architectures = [type(model).__name__]
    config = from_hf_config(model.config.to_dict())
    plan = make_plan(config, **{"rank_up": 8, "rank_down": 8, **plan_options})
    frozen = {name: model.state_dict()[name] for name in tensor_names(config)}
    tensors = {**frozen, **dict(RandomBasis(plan, config, 0).tensors())}
    adapter = init_adapter(plan, PRINTS.basis, PRINTS.model, std=0.1, seed=1)
    return World(config, plan, tensors, adapter.weights)


BOTH_BORDERS: dict[str, Any] = {"every": 2, "edge_first": 1, "edge_last": 1}
"""Spans that cross into and out of the cloud's layers: y is kept on the edge as well."""


@asynccontextmanager
async def serving(handler: Handler, limits: Limits | None = None) -> AsyncIterator[str]:
    """An address at which ``handler`` gets every connection."""
    name = f"inproc://unit-{next(_numbers)}"
    async with await listen(name, handler, limits or Limits()) as listener:
        yield listener.address


async def solo(model: LanguageModel, *steps: list[int]) -> torch.Tensor:
    """Logits (all positions, vocab_size) of one sequence run step by step."""
    sequence = await model.open_sequence(sum(map(len, steps)))
    logits, position = [], 0
    for tokens in steps:
        logits.append(await sequence.forward(tokens, position, "all"))
        position += len(tokens)
    await sequence.aclose()
    return torch.cat(logits)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order in which numbers were added."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
