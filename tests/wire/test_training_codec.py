"""Messages of training steps to frames and back, and frames of theirs that nobody should send."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.runtime.wire.codec import decode, encode
from privatelora.runtime.wire.messages import (
    PROTOCOL_VERSION,
    BackwardBegin,
    BackwardEnd,
    BatchSequence,
    GradientReply,
    GradientRequest,
    Message,
    TensorPayload,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import MAX_SEQUENCES, TYPES, WireLimits
from tests.wire.samples import LIMITS, content_of, frame_of, name_of, outcome, payload, sealed

SEQUENCES = (BatchSequence(1, 1), BatchSequence(2, 0), BatchSequence(2, 2))
# The table of its sequences is at 96 to 119, hidden states at 128 to 157, opening at 160 to 199.
BATCH = TrainBegin(9, 0, SEQUENCES, True, payload(5, 3), payload(5, 4))
BACKWARD = BackwardBegin(9, 0, payload(2, 3))
ASKED = GradientRequest(9, 0, 3, payload(2, 6))
ANSWER = GradientReply(9, 0, 3, payload(2, 6))
# opening at 96 to 113, hidden states at 128 to 151.
DONE = BackwardEnd(9, 0, payload(3, 3), payload(3, 4))


def batch_frame(sequences: Sequence[tuple[int, int]], rows: int, backward: int = 1) -> bytearray:
    """A TrainBegin of someone who checks nothing, with a tensor of 2 bytes."""
    table = b"".join(struct.pack("<II", *sequence) for sequence in sequences)
    return bytearray(
        struct.pack("<BBHI", TYPES[TrainBegin], 0, PROTOCOL_VERSION, 88)
        + struct.pack("<QQII", 9, 0, len(sequences), backward)
        + struct.pack("<IIQ16s", rows, 1, 2, b"fp16")
        + bytes(32)
        + table
        + bytes(-len(table) % 16)
        + b"hh"
    )


def batch(sequences: Sequence[tuple[int, int]], rows: int) -> TrainBegin:
    """What ``batch_frame`` writes."""
    hidden_states = TensorPayload("fp16", (rows, 1), b"hh")
    listed = tuple(BatchSequence(*sequence) for sequence in sequences)
    return TrainBegin(9, 0, listed, True, hidden_states, None)


# Good ones


@pytest.mark.parametrize("sequences", [[(1, 1)], [(3, 2), (1, 0)], [(1, 1)] * MAX_SEQUENCES])
def test_a_batch_is_written_as_it_is_read(sequences: list[tuple[int, int]]) -> None:
    rows = sum(num_rows for num_rows, _ in sequences)
    frame, message = batch_frame(sequences, rows), batch(sequences, rows)
    assert outcome(frame) == message
    assert content_of(message) == frame


def test_sequences_and_their_numbers_have_the_right_types() -> None:
    again = decode(frame_of(BATCH), LIMITS)
    assert isinstance(again, TrainBegin)
    assert again.backward is True
    assert [type(sequence) for sequence in again.sequences] == [BatchSequence] * 3


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_encoding_passes_tensor_data_on(wrap: type) -> None:
    first, second = wrap(bytes(5)), wrap(bytes(7))
    hidden_states = TensorPayload("fp16", (1, 2), first)
    opening = TensorPayload("fp16", (1, 3), second)
    both: tuple[Message, ...] = (
        TrainBegin(1, 1, (BatchSequence(1, 1),), True, hidden_states, opening),
        BackwardEnd(1, 1, opening, hidden_states),
    )
    for message in both:
        parts = encode(message)
        assert any(part is first for part in parts)
        assert any(part is second for part in parts)
    one: tuple[Message, ...] = (
        BackwardBegin(1, 1, hidden_states),
        GradientRequest(1, 1, 0, hidden_states),
        GradientReply(1, 1, 0, hidden_states),
        BackwardEnd(1, 1, None, hidden_states),
        BackwardEnd(1, 1, hidden_states, None),
    )
    for message in one:
        assert encode(message)[-2] is first


@pytest.mark.parametrize("message", [BATCH, DONE], ids=lambda m: type(m).__name__)
def test_decoding_slices_the_frame(message: TrainBegin | BackwardEnd) -> None:
    frame = frame_of(message)
    again = decode(frame, LIMITS)
    assert isinstance(again, TrainBegin | BackwardEnd)
    for tensor in (again.hidden_states, again.opening):
        assert tensor is not None
        assert isinstance(tensor.data, memoryview)
        assert tensor.data.obj is frame.obj


@given(st.integers(1, 9), st.integers(0, 40), st.none() | st.integers(0, 40))
@settings(deadline=None)
def test_tensors_of_a_batch_begin_at_multiples_of_16(
    num_sequences: int, hidden: int, opening: int | None
) -> None:
    message = TrainBegin(
        *(1, 1, (BatchSequence(1, 1),) * num_sequences, True),
        TensorPayload("fp16", (num_sequences, 1), b"h" * hidden),
        None if opening is None else TensorPayload("fp16", (num_sequences, 1), b"o" * opening),
    )
    frame = content_of(message)
    end = 96 + 8 * num_sequences
    assert frame[96:end] == struct.pack("<II", 1, 1) * num_sequences
    for letter, size in ((b"h", hidden), (b"o", opening)):
        if size is not None:
            start = end + -end % 16
            assert frame[end:start] == bytes(start - end)
            end = start + size
            assert frame[start:end] == letter * size
    assert end == len(frame)
    assert outcome(frame) == message


@given(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40))
@settings(deadline=None)
def test_either_tensor_of_a_backward_pass_may_be_missing(
    opening: int | None, hidden: int | None
) -> None:
    tensors = [
        None if nbytes is None else TensorPayload("fp16", (1, 1), b"x" * nbytes)
        for nbytes in (opening, hidden)
    ]
    message = BackwardEnd(1, 1, *tensors)
    frame = content_of(message)
    assert outcome(frame) == message
    for offset, tensor in zip((32, 64), tensors, strict=True):
        assert (frame[offset : offset + 32] == bytes(32)) is (tensor is None)


# What is wrong with a batch

WRONG_BATCHES: list[tuple[list[tuple[int, int]], int, str]] = [
    ([], 0, "0 sequences, not 1 to 4096"),
    ([], 1, "0 sequences"),
    ([(1, 1)] * (MAX_SEQUENCES + 1), MAX_SEQUENCES + 1, "4097 sequences"),
    ([(0, 0)], 0, "a sequence of 0 rows"),
    ([(0, 0)], 1, "a sequence of 0 rows"),
    ([(1, 1), (0, 0), (1, 1)], 2, "a sequence of 0 rows"),
    ([(1, 2)], 1, "1 rows of which 2"),
    ([(4, 1), (3, 2**32 - 1)], 7, "3 rows of which 4294967295"),
    ([(1, 1), (2, 1)], 2, "2 rows are not those of the sequences"),
    ([(1, 1), (2, 1)], 4, "4 rows are not"),
    ([(1, 1), (2, 1)], 0, "0 rows are not"),
    # So that 32 bits would be enough for their sum.
    ([(2**32 - 1, 1), (2, 1)], 1, "1 rows are not"),
    ([(2**31, 0), (2**31, 0), (5, 5)], 5, "5 rows are not"),
]


@pytest.mark.parametrize(("sequences", "rows", "reason"), WRONG_BATCHES, ids=lambda value: None)
def test_a_batch_that_does_not_add_up_is_refused_at_both_ends(
    sequences: list[tuple[int, int]], rows: int, reason: str
) -> None:
    result = outcome(batch_frame(sequences, rows))
    assert isinstance(result, RemoteProtocolError)
    assert reason in str(result)
    with pytest.raises(LocalProtocolError, match=f"TrainBegin cannot be sent: .*{reason}"):
        encode(batch(sequences, rows))


def test_a_batch_has_hidden_states() -> None:
    frame = batch_frame([(1, 1)], 1)
    frame[32:64], frame[64:96] = frame[64:96], frame[32:64]
    result = outcome(frame)
    assert isinstance(result, RemoteProtocolError)
    assert str(result) == "TrainBegin: no hidden states"


@pytest.mark.parametrize("backward", [2, 256, 2**32 - 1])
def test_backward_is_0_or_1(backward: int) -> None:
    assert isinstance(outcome(batch_frame([(1, 1)], 1)), TrainBegin)
    result = outcome(batch_frame([(1, 1)], 1, backward))
    assert isinstance(result, RemoteProtocolError)
    assert f"backward {backward} is neither 0 nor 1" in str(result)
    wrong: Any = backward
    with pytest.raises(LocalProtocolError, match=f"backward {backward} is neither 0 nor 1"):
        encode(dataclasses.replace(BATCH, backward=wrong))


def test_many_sequences_that_are_only_announced_cost_no_memory() -> None:
    frames = []
    for number in (MAX_SEQUENCES, MAX_SEQUENCES + 1, 2**32 - 1):
        frame = content_of(BATCH)
        struct.pack_into("<I", frame, 24, number)
        frames.append(sealed(frame))
    tracemalloc.start()
    try:
        for one in frames:
            with pytest.raises(RemoteProtocolError):
                decode(one, LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**16


# Every field

COMMON: list[tuple[int, str, int | bytes, str]] = [
    (1, "B", 1, "flags"),
    (2, "H", 2, "version 2"),
    (4, "I", 2**32 - 1, "header"),
    (8, "Q", 2**53, "id"),
    (8, "Q", 2**64 - 1, "id"),
    (16, "Q", 2**53, "id"),
    (32, "I", 2**20 + 1, "1048577"),
    (36, "I", 2**20 + 1, "1048577"),
    (36, "I", 2**32 - 1, "4294967295"),
    (40, "Q", 2**64 - 1, "declares 18446744073709551615 bytes"),
    (48, "16s", b"", "codec"),
    (48, "16s", b"FP16", "codec"),
    (48, "16s", b"fp\x0016", "codec"),
    (48, "16s", b"\xfffp16", "codec"),
]
SECOND_TENSOR: list[tuple[int, str, int | bytes, str]] = [
    (4, "I", 56, "header of 56 bytes where it has 88"),
    (64, "I", 2**20 + 1, "1048577"),
    (68, "I", 2**32 - 1, "4294967295"),
    (72, "Q", 2**64 - 1, "declares 18446744073709551615 bytes"),
    (72, "Q", 2**63, "declares"),
    (80, "16s", b"", "codec"),
    (80, "16s", b"fp16\n", "codec"),
    (32, "32s", b"", "declares"),
    (64, "32s", b"", "declares"),
]
ONLY_TENSOR: list[tuple[int, str, int | bytes, str]] = [
    (4, "I", 88, "header of 88 bytes where it has 56"),
    (28, "I", 1, "reserved"),
    (28, "I", 2**31, "reserved"),
    (40, "Q", 1, "declares 1 bytes of tensor data, the frame has"),
]
OF_BATCH: list[tuple[int, str, int | bytes, str]] = [
    (24, "I", 0, "declares"),
    (24, "I", 2, "padding"),
    (24, "I", 4, "a sequence of 0 rows"),  # which is the padding of the table
    (24, "I", 14, "is cut off: its header alone takes 208"),
    (24, "I", MAX_SEQUENCES, "cut off"),
    (24, "I", MAX_SEQUENCES + 1, "4097 sequences"),
    (24, "I", 2**32 - 1, "4294967295 sequences"),
    (28, "I", 2, "backward 2"),
    (32, "I", 4, "4 rows are not"),
    (32, "I", 0, "0 rows are not"),
    (40, "Q", 29, "padding"),
    (40, "Q", 33, "declares"),
    (64, "I", 4, "opening has 4 rows in a batch of 5"),
    (64, "I", 0, "opening has 0 rows in a batch of 5"),
    (72, "Q", 39, "declares 103 bytes of tensor data, the frame has 104"),
    (96, "I", 0, "a sequence of 0 rows"),
    (96, "I", 2, "5 rows are not"),
    (100, "I", 2, "1 rows of which 2"),
    (104, "I", 2**32 - 1, "5 rows are not"),
    (116, "I", 3, "2 rows of which 3"),
    (120, "B", 1, "padding"),
    (127, "B", 0x80, "padding"),
    (158, "B", 1, "padding"),
]
OF_DONE: list[tuple[int, str, int | bytes, str]] = [
    (24, "I", 1, "reserved"),
    (28, "I", 1, "reserved"),
    (40, "Q", 17, "padding"),
    (72, "Q", 23, "declares 55 bytes of tensor data, the frame has 56"),
    (114, "B", 1, "padding"),
    (127, "B", 1, "padding"),
]


@pytest.mark.parametrize(
    ("message", "offset", "layout", "value", "reason"),
    [
        (message, *change)
        for message, changes in (
            (BATCH, (*COMMON, *SECOND_TENSOR, *OF_BATCH)),
            (BACKWARD, (*COMMON, *ONLY_TENSOR, (24, "I", 1, "reserved"))),
            (ASKED, (*COMMON, *ONLY_TENSOR)),
            (ANSWER, (*COMMON, *ONLY_TENSOR)),
            (DONE, (*COMMON, *SECOND_TENSOR, *OF_DONE)),
        )
        for change in changes
    ],
    ids=lambda value: type(value).__name__ if dataclasses.is_dataclass(value) else None,
)
def test_a_wrong_field_is_refused(
    message: Message, offset: int, layout: str, value: int | bytes, reason: str
) -> None:
    frame = content_of(message)
    assert outcome(frame) == message
    struct.pack_into(f"<{layout}", frame, offset, value)
    result = outcome(frame)
    assert isinstance(result, RemoteProtocolError)
    assert reason in str(result)
    assert type(message).__name__ in str(result) or reason == "codec"


@pytest.mark.parametrize("message", [BATCH, BACKWARD, ASKED, ANSWER, DONE])
def test_tighter_limits_are_kept(message: Message) -> None:
    roomy = WireLimits(max_rows=5, max_features=6)
    assert decode(frame_of(message), roomy) == message
    for tight in (WireLimits(max_rows=1), WireLimits(max_features=2)):
        with pytest.raises(RemoteProtocolError, match="too large, at most"):
            decode(frame_of(message), tight)


@pytest.mark.parametrize("second", [(6, 1), (1, 7)], ids=["rows", "features"])
def test_limits_hold_for_the_second_tensor_too(second: tuple[int, int]) -> None:
    message = BackwardEnd(9, 0, payload(1, 1), payload(*second))
    assert decode(frame_of(message), LIMITS) == message
    with pytest.raises(RemoteProtocolError, match="at most 5 x 6"):
        decode(frame_of(message), WireLimits(max_rows=5, max_features=6))


# What this end must not send


FLOATS: Any = memoryview(bytes(8)).cast("f")
ONE = (BatchSequence(1, 1),)


@pytest.mark.parametrize(
    "message",
    [
        TrainBegin(2**53, 0, ONE, True, payload(), None),
        TrainBegin(0, -1, ONE, True, payload(), None),
        TrainBegin(0, 0, ONE, True, payload(0), None),
        TrainBegin(0, 0, ONE, True, payload(codec="FP16"), None),
        TrainBegin(0, 0, ONE, True, TensorPayload("fp16", (1, 4), FLOATS), None),
        TrainBegin(0, 0, ONE, True, TensorPayload("fp16", (1, 2**32), b""), None),
        TrainBegin(0, 0, ONE, True, payload(), payload(2)),
        TrainBegin(0, 0, ONE, True, payload(), payload(0)),
        TrainBegin(0, 0, ONE, True, payload(), payload(codec="x" * 17)),
        TrainBegin(0, 0, (BatchSequence(-1, 0), BatchSequence(2, 1)), True, payload(), None),
        TrainBegin(0, 0, (BatchSequence(1, -1),), True, payload(), None),
        # Each fits together, but not into 32 bits.
        TrainBegin(
            *(0, 0, (BatchSequence(2**32, 0),), True),
            *(TensorPayload("fp16", (2**32, 1), b""), None),
        ),
        TrainBegin(
            *(0, 0, (BatchSequence(2**31, 0),) * 2, True),
            *(TensorPayload("fp16", (2**32, 1), b""), None),
        ),
        BackwardBegin(0, 2**53, payload()),
        BackwardBegin(-1, 0, payload()),
        BackwardBegin(0, 0, payload(codec="")),
        BackwardBegin(0, 0, TensorPayload("fp16", (-1, 1), b"")),
        GradientRequest(2**53, 0, 0, payload()),
        GradientRequest(0, 0, 2**32, payload()),
        GradientRequest(0, 0, -1, payload()),
        GradientRequest(0, 0, 0, TensorPayload("fp16", (1, 2**32), b"")),
        GradientReply(0, 2**53, 0, payload()),
        GradientReply(0, 0, 2**32, payload()),
        GradientReply(0, 0, 0, TensorPayload("fp16", (1, 4), memoryview(bytes(16))[::2])),
        BackwardEnd(2**53, 0, None, None),
        BackwardEnd(0, -1, None, payload()),
        BackwardEnd(0, 0, payload(codec="a codec"), None),
        BackwardEnd(0, 0, None, payload(codec="")),
        BackwardEnd(0, 0, TensorPayload("fp16", (2**32, 1), b""), None),
        BackwardEnd(0, 0, None, TensorPayload("fp16", (1, 4), FLOATS)),
    ],
    ids=name_of,
)
def test_what_no_peer_would_accept_is_not_sent(message: Message) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        encode(message)
    assert len(str(caught.value).splitlines()) == 1
