"""Other ways to split a model, re-created for the size and the order of what they send.

Each is a list of frames that go there and back while a token is made, in lockstep. The cloud's end
really decodes (the whole model, unsplit), so a token takes its computing, all its round trips and
all its bytes; what the frames hold is noise. Left out is what an edge would compute with them: all
of these get the better of it. Nothing of another system's code is here.

    text            the whole model on the cloud, which streams tokens: one round trip an answer
    hidden-states   at every layer the normalised hidden state goes down and the update of q, k and
                    v comes up, in fp16: what private parameters cost without the low rank
    lora-two-layers the same at two layers only, the paper's middle and last
    published       the paper's system: per layer r numbers for each of q, k and v down and up, and
                    the hidden state at both ends, as pickled float32 arrays
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import time

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from privatelora.benchmarks.predict_hardware import Link
from privatelora.benchmarks.sweep_config import BaselineName
from privatelora.errors import ConnectionClosed, RemoteProtocolError
from privatelora.partition.models.config import DecoderConfig
from privatelora.runtime.language_model import LanguageModel
from privatelora.transports.base import Connection

PUBLISHED_RANK = 128
FLOAT16 = 2
"""Bytes of a number."""
TOKEN_NBYTES = 16
"""About one token as a server-sent event's data would have it, without its envelope."""
MAX_EXCHANGES = 1024
MAX_NBYTES = 2**24

_Nbytes = Field(ge=0, le=MAX_NBYTES)


class Traffic(BaseModel):
    """What one token puts on the wire, in this order; each exchange goes down, then up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    up: int | None = Field(default=None, ge=0, le=MAX_NBYTES)
    """What the edge sends before the cloud begins; None: the cloud goes on by itself."""
    exchange_down: int = _Nbytes
    exchange_up: int = _Nbytes
    exchanges: int = Field(ge=0, le=MAX_EXCHANGES)
    down: int = _Nbytes
    """What the cloud sends at the end."""

    @property
    def round_trips(self) -> int:
        """For each token."""
        return self.exchanges + (self.up is not None)

    @property
    def nbytes(self) -> int:
        """Both directions, without framing."""
        return (self.up or 0) + self.down + self.exchanges * (self.exchange_down + self.exchange_up)

    def seconds(self, compute_s: float, link: Link) -> float:
        """Predicted for one token: computing, round trips and bytes, one after the other."""
        down_s = link.down_s(self.down + self.exchanges * self.exchange_down)
        if self.up is None:  # nothing waits for anything
            return max(compute_s, down_s)
        up_s = link.up_s(self.up + self.exchanges * self.exchange_up)
        return compute_s + self.round_trips * link.rtt_s + up_s + down_s


class ReplayRequest(BaseModel):
    """A conversation of ``tokens`` after a prompt of as many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    traffic: Traffic
    prompt_tokens: int = Field(ge=1, le=4096)
    tokens: int = Field(ge=1, le=4096)


def traffic(baseline: BaselineName, config: DecoderConfig) -> Traffic:
    """What ``baseline`` sends for a token of a model of this shape."""
    hidden, layers = config.hidden_size, config.num_layers
    updates = sum(config.projection_size(target) for target in "qkv")
    match baseline:
        case "text":
            return Traffic(exchange_down=0, exchange_up=0, exchanges=0, down=TOKEN_NBYTES)
        case "hidden-states" | "lora-two-layers":
            return Traffic(
                up=FLOAT16 * hidden,
                exchange_down=FLOAT16 * hidden,
                exchange_up=FLOAT16 * updates,
                exchanges=layers if baseline == "hidden-states" else min(2, layers),
                down=FLOAT16 * hidden,
            )
        case "published":
            ends, blocks = pickled_nbytes(hidden), pickled_nbytes(3 * PUBLISHED_RANK)
            return Traffic(
                up=ends, exchange_down=blocks, exchange_up=blocks, exchanges=layers, down=ends
            )
        case _:
            raise ValueError(f"{baseline} sends nothing")


def pickled_nbytes(numbers: int) -> int:
    """Bytes of so many float32 in one pickled array of shape (1, 1, numbers)."""
    import numpy as np

    return len(pickle.dumps(np.zeros((1, 1, numbers), dtype=np.float32)))


async def serve_replay(connection: Connection, model: LanguageModel) -> None:
    """The cloud's end: decode, and send frames in between, until the peer goes."""
    async with connection:
        with contextlib.suppress(ConnectionClosed):
            while True:
                try:
                    request = ReplayRequest.model_validate_json(bytes(await connection.recv()))
                except ValidationError as error:
                    raise RemoteProtocolError(f"not a request to replay: {error}") from error
                await _decode(connection, model, request)


async def _decode(connection: Connection, model: LanguageModel, request: ReplayRequest) -> None:
    plan = request.traffic
    exchange, last = os.urandom(plan.exchange_down), os.urandom(plan.down)
    sequence = await model.open_sequence(request.prompt_tokens + request.tokens)
    try:
        (await sequence.forward([1] * request.prompt_tokens, 0, "last")).cpu()
        for position in range(request.prompt_tokens, request.prompt_tokens + request.tokens):
            if plan.up is not None:
                await connection.recv()
            # A GPU is done when its result is here.
            (await sequence.forward([1 + position], position, "last")).cpu()
            for _ in range(plan.exchanges):
                await connection.send(exchange)
                await connection.recv()
            await connection.send(last)
            await asyncio.sleep(0)  # decoding never waits; what is sent has to leave
    finally:
        await sequence.aclose()


async def replay(connection: Connection, request: ReplayRequest) -> list[float]:
    """The edge's end; the moments at which the tokens came, by the monotonic clock."""
    plan = request.traffic
    first, exchange = os.urandom(plan.up or 0), os.urandom(plan.exchange_up)
    moments = []
    await connection.send(request.model_dump_json().encode())
    for _ in range(request.tokens):
        if plan.up is not None:
            await connection.send(first)
        for _ in range(plan.exchanges):
            await connection.recv()
            await connection.send(exchange)
        await connection.recv()
        moments.append(time.monotonic())
    return moments
