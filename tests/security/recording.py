"""What crosses a connection, as the cloud sees it: every frame that it gets and sends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from privatelora.runtime.cloud import Cloud
from privatelora.runtime.config import CloudConfig, EdgeConfig
from privatelora.runtime.edge import Edge
from privatelora.runtime.generation import Context, GenerationStats, generate_tokens
from privatelora.runtime.link_config import PayloadConfig
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.runtime.tensors import unpack
from privatelora.runtime.wire.codec import decode
from privatelora.runtime.wire.messages import (
    ExchangeReply,
    ExchangeRequest,
    Message,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.transports.base import Buffer, Connection, Limits
from privatelora.transports.framing import HEADER, HEADER_NBYTES
from privatelora.transports.registry import listen

CODECS = {"fp32": PayloadConfig.model_validate("fp32"), "default": PayloadConfig()}


class RecordingConnection(Connection):
    """Passes everything on to another one and keeps a copy of each frame, in order."""

    def __init__(self, inner: Connection, frames: list[bytes]) -> None:
        self.counters = inner.counters
        self._inner = inner
        self._frames = frames

    @property
    def peer(self) -> str:
        return self._inner.peer

    @property
    def identity(self) -> str | None:
        return self._inner.identity

    async def send(self, *parts: Buffer) -> None:
        self._frames.append(b"".join(parts))
        await self._inner.send(*parts)

    async def recv(self) -> memoryview:
        frame = await self._inner.recv()
        self._frames.append(bytes(frame))
        return frame

    def recv_nowait(self) -> memoryview | None:
        frame = self._inner.recv_nowait()
        if frame is not None:
            self._frames.append(bytes(frame))
        return frame

    async def aclose(self) -> None:
        await self._inner.aclose()

    def abort(self) -> None:
        self._inner.abort()


@dataclass
class Seen:
    """The numbers in some frames, float32: what came first is first.

    ``hidden_states``: (positions, hidden_size) that steps began with. ``exchanges``: z and y by
    exchange point, (positions, z_size) and (positions, y of the layers). ``final``: (rows,
    hidden_size) that steps ended with.
    """

    hidden_states: torch.Tensor
    final: torch.Tensor
    exchanges: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def look(frames: Iterable[bytes]) -> Seen:
    """Decode the frames of one or several generations."""
    begun, final = [], []
    asked: dict[tuple[int, int, int], torch.Tensor] = {}
    pairs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for frame in frames:
        match _message(frame):
            case StepBegin(hidden_states=hidden_states):
                begun.append(_numbers(hidden_states))
            case ExchangeRequest() as request:
                key = request.session_id, request.step_id, request.point
                asked[key] = _numbers(request.z)
            case ExchangeReply() as reply:
                z = asked.pop((reply.session_id, reply.step_id, reply.point))
                pairs.setdefault(reply.point, []).append((z, _numbers(reply.y)))
            case StepEnd(hidden_states=hidden_states):
                final.append(_numbers(hidden_states))
    return Seen(
        torch.cat(begun),
        torch.cat(final),
        {
            point: (torch.cat([z for z, _ in found]), torch.cat([y for _, y in found]))
            for point, found in pairs.items()
        },
    )


def cut_frames(stream: bytes) -> list[bytes]:
    """The frames in what one end of a ``tcp://`` connection sent."""
    frames, place = [], 0
    while place < len(stream):
        _, nbytes = HEADER.unpack_from(stream, place)
        place += HEADER_NBYTES
        frames.append(stream[place : place + nbytes])
        place += nbytes
    return frames


def _message(frame: bytes) -> Message:
    return decode(memoryview(frame), WireLimits())


def _numbers(payload: TensorPayload) -> torch.Tensor:
    return unpack(payload, torch.device("cpu"), torch.float32)


class RecordingCloud:
    """A cloud that keeps all frames, in ``frames``."""

    def __init__(self, shard: Path) -> None:
        self.frames: list[bytes] = []
        self._cloud = Cloud(CloudConfig(listen="inproc://curious", shard=shard))

    @asynccontextmanager
    async def serving(self, name: str) -> AsyncIterator[str]:
        """The address at which it serves."""

        async def handle(connection: Connection) -> None:
            await self._cloud.service.handle(RecordingConnection(connection, self.frames))

        async with await listen(f"inproc://{name}", handle, Limits()) as listener:
            yield listener.address


async def generate(config: EdgeConfig, prompts: list[list[int]], num_tokens: int) -> list[int]:
    """Greedy answers to all prompts, each in a session of its own, one after the other."""
    edge = Edge(config)
    answers = []
    try:
        for prompt in prompts:
            context = await Context.open(edge.model, len(prompt) + num_tokens)
            params = SamplingParams(max_tokens=num_tokens)
            tokens = generate_tokens(context, prompt, params, (), GenerationStats())
            async with aclosing(tokens):
                answers += [token async for token in tokens]
            await context.aclose()
    finally:
        await edge.aclose()
    return answers
