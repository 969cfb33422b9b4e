"""How much memory a peer's bytes can make an end take."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import lz4.block
import pytest
import torch

from privatelora.runtime.payload.codec import CODEC_NAMES, decode, plain_nbytes
from privatelora.runtime.wire.codec import decode as decode_message
from privatelora.runtime.wire.messages import (
    BatchSequence,
    CloseSession,
    ErrorCode,
    ErrorReply,
    ExchangeRequest,
    Message,
    OpenSession,
    SessionClosed,
    StepBegin,
    TensorPayload,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import MAX_SEQUENCES, PRELUDE, TYPES
from tests.fuzz.cases import episode_targets, make_case, targets
from tests.fuzz.end import LIMITS, End, Tally
from tests.fuzz.memory import CONSTANT_NBYTES, peak_nbytes
from tests.fuzz.recordings import streamed
from tests.wire.ends import (
    begin,
    drop,
    end,
    end_back,
    go_back,
    greeted,
    train,
    with_session,
    with_training_session,
)
from tests.wire.samples import frame_of

LZ4: Any = lz4.block  # ships without annotations
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("traced")

NBYTES_PER_BYTE = 72
"""An empty map is one byte of MessagePack, and 64 of Python and its place in a list."""
PLAIN_NBYTES_PER_BYTE = 24
"""Of a tensor's data: a byte of ``int4`` is two numbers, of 4 bytes, several times."""
COMPRESSED_NBYTES_PER_NUMBER = 20
"""Of a tensor of the shape that was due: what it is in float32, five times."""


def ready_for_a_step(tally: Tally, kind: type[Message] = StepBegin) -> End:
    """A cloud whose session 1 is open."""
    return next(
        target.end(tally)
        for target in targets()
        if target.coming and isinstance(target.coming[0].message, kind)
    )


async def test_spoilt_frames_take_little() -> None:
    seed, tally = 5, Tally()
    for index in range(1500):
        ends = episode_targets(seed, index)
        case = make_case(seed, index, ends)
        stream = b"".join(case.pieces)
        peak = peak_nbytes(partial(ends[case.slot].end(tally).feed, stream))
        assert peak <= CONSTANT_NBYTES + NBYTES_PER_BYTE * len(stream), f"frame {index}"


@pytest.mark.parametrize(
    "header",
    [
        b"\xdc\x00\x40" * 1000,
        b"\xdc\x00\x40" * 20_000,
        b"\xdc\x00\x40" + (b"\xdc\x00\x40" + (b"\xdc\x00\x10" + b"\x90" * 16) * 64) * 54,
        b"\xdc\x00\x40" + (b"\xdc\x00\x40" + (b"\xdc\x00\x10" + b"\x80" * 16) * 64) * 54,
        b"\xdc\x00\x40" + (b"\xdb\x00\x00\x3f\xf0" + b"x" * 0x3FF0) * 4,
    ],
    ids=["announced", "deep", "lists", "maps", "texts"],
)
async def test_headers_take_little(header: bytes) -> None:
    frame = PRELUDE.pack(TYPES[OpenSession], 0, 1, len(header)) + header
    stream = streamed(frame)
    peak = peak_nbytes(partial(ready_for_a_step(Tally()).feed, stream))
    assert peak <= CONSTANT_NBYTES + NBYTES_PER_BYTE * len(stream)


async def test_sequences_take_little() -> None:
    batch = TrainBegin(
        *(1, 9, (BatchSequence(1, 1),) * MAX_SEQUENCES, True),
        *(TensorPayload("fp16", (MAX_SEQUENCES, 1), b""), None),
    )
    stream = streamed(bytes(frame_of(batch)))
    peak = peak_nbytes(partial(ready_for_a_step(Tally(), TrainBegin).feed, stream))
    assert peak <= CONSTANT_NBYTES + NBYTES_PER_BYTE * len(stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_tensors_take_little(codec: str, dtype: torch.dtype) -> None:
    shape = (256, 1024)
    data = bytearray(plain_nbytes(codec, shape))
    allowed = PLAIN_NBYTES_PER_BYTE * len(data)
    if codec.endswith("+lz4"):
        data = bytearray(LZ4.compress(data, store_size=False))
        allowed = COMPRESSED_NBYTES_PER_NUMBER * shape[0] * shape[1]
    view = memoryview(data)
    peak = peak_nbytes(lambda: decode(codec, shape, view, device=CPU, dtype=dtype))
    assert peak + dtype.itemsize * shape[0] * shape[1] <= allowed


# What stays


def growth_nbytes(work: Callable[[int], object]) -> int:
    """Memory that the second half of many calls leaves behind."""
    for number in range(2000):
        work(number)
    before, _ = tracemalloc.get_traced_memory()
    for number in range(2000, 4000):
        work(number)
    return tracemalloc.get_traced_memory()[0] - before


@pytest.mark.parametrize("last_word", ["closed", "failed"])
def test_sessions_that_are_over_leave_nothing(last_word: str) -> None:
    cloud = greeted().cloud

    def one_session(session_id: int) -> None:
        cloud.receive(frame_of(OpenSession(session_id, 64, "fp16", "fp16")))
        if last_word == "closed":
            cloud.receive(frame_of(CloseSession(session_id)))
            cloud.send(SessionClosed(session_id))
        else:
            cloud.send(ErrorReply(ErrorCode.CAPACITY, "full", session_id))

    assert growth_nbytes(one_session) < 20_000


def test_steps_that_are_over_leave_nothing() -> None:
    edge = with_session().edge

    def one_step(step_id: int) -> None:
        edge.send(begin(step_id))
        edge.receive(frame_of(end(step_id)))

    assert growth_nbytes(one_step) < 20_000


@pytest.mark.parametrize("way", ["forward only", "back", "dropped"])
def test_training_steps_that_are_over_leave_nothing(way: str) -> None:
    edge = with_training_session().edge

    def one_step(step_id: int) -> None:
        edge.send(train(step_id, backward=way != "forward only"))
        edge.receive(frame_of(end(step_id)))
        if way == "back":
            edge.send(go_back(step_id))
            edge.receive(frame_of(end_back(step_id)))
        elif way == "dropped":
            edge.send(drop(step_id))

    assert growth_nbytes(one_step) < 20_000


def test_names_of_codecs_leave_nothing() -> None:
    def one_name(number: int) -> None:
        z = TensorPayload(f"codec{number}", (1, 1), b"12")
        decode_message(frame_of(ExchangeRequest(1, 1, 1, z)), LIMITS)

    assert growth_nbytes(one_name) < 20_000
