"""Messages to frames and back, and what becomes of frames that nobody should send."""

from __future__ import annotations

import dataclasses
import random
import struct
import tracemalloc
from collections.abc import Iterable
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privatelora.errors import LocalProtocolError, RemoteProtocolError, VersionMismatch
from privatelora.runtime.wire.codec import decode, encode
from privatelora.runtime.wire.messages import (
    PROTOCOL_VERSION,
    CloseSession,
    DropStep,
    ErrorCode,
    ErrorReply,
    ExchangeRequest,
    Fingerprints,
    Hello,
    Message,
    OpenSession,
    OutputRows,
    Ping,
    Pong,
    SessionClosed,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.runtime.wire.prelude import TYPES, WireLimits
from tests.wire.samples import (
    EDGE_HELLO,
    LIMITS,
    SAMPLES,
    content_of,
    frame_of,
    messages,
    name_of,
    outcome,
    payload,
    sealed,
)

MSGPACK: Any = msgpack  # ships without annotations
EXCHANGE = ExchangeRequest(7, 9, 3, payload(2, 6))
BEGIN = StepBegin(7, 9, 12, OutputRows.LAST, payload(2, 3), payload(2, 4))

each_sample = pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)


def control_frame(kind: type[Message], header: bytes) -> bytes:
    if kind in (Hello, ErrorReply):
        header = b"PrivLoRA" + header
    return struct.pack("<BBHI", TYPES[kind], 0, PROTOCOL_VERSION, len(header)) + header


# Round trips


@given(messages)
@settings(max_examples=400, deadline=None)
def test_a_message_survives(message: Message) -> None:
    assert decode(frame_of(message), LIMITS) == message


@each_sample
def test_every_kind_survives_with_its_types(message: Message) -> None:
    again = decode(frame_of(message), LIMITS)
    assert again == message
    for field in dataclasses.fields(message):
        assert type(getattr(again, field.name)) is type(getattr(message, field.name))


def test_every_kind_of_message_is_sampled() -> None:
    assert {type(message) for message in SAMPLES} == set(TYPES)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_encoding_passes_tensor_data_on(wrap: type) -> None:
    hidden, opening = wrap(bytes(5)), wrap(bytes(7))
    begin = StepBegin(
        1,
        1,
        0,
        OutputRows.ALL,
        TensorPayload("fp16", (1, 2), hidden),
        TensorPayload("fp16", (1, 3), opening),
    )
    parts = encode(begin)
    assert any(part is hidden for part in parts)
    assert any(part is opening for part in parts)
    for message in (
        ExchangeRequest(1, 1, 0, begin.hidden_states),
        StepEnd(1, 1, begin.hidden_states),
    ):
        assert encode(message)[-2] is hidden


def test_decoding_slices_the_frame() -> None:
    frame = frame_of(BEGIN)
    message = decode(frame, LIMITS)
    assert isinstance(message, StepBegin)
    assert message.opening is not None
    for tensor in (message.hidden_states, message.opening):
        assert isinstance(tensor.data, memoryview)
        assert tensor.data.obj is frame.obj
    frame[-5] ^= 0xFF
    assert message.opening.data[-1] == frame[-5]


@given(st.integers(0, 100), st.integers(0, 100))
@settings(deadline=None)
def test_tensors_begin_at_multiples_of_16(hidden: int, opening: int) -> None:
    begin = StepBegin(
        1,
        1,
        0,
        OutputRows.ALL,
        TensorPayload("fp16", (1, 1), b"h" * hidden),
        TensorPayload("fp16", (1, 1), b"o" * opening),
    )
    frame = content_of(begin)
    assert frame[:96].count(b"hhh") == 0
    assert frame[96 : 96 + hidden] == b"h" * hidden
    start = len(frame) - opening
    assert start % 16 == 0
    assert 0 <= start - 96 - hidden < 16


def test_error_text_is_made_fit_to_send() -> None:
    rude = ErrorReply(
        ErrorCode.INTERNAL, "one\ntwo\x1b[31m \ud800" + "x" * 5000, None, {"path": "a\0b" * 500}
    )
    sent = decode(frame_of(rude), LIMITS)
    assert isinstance(sent, ErrorReply)
    assert sent.message.startswith("one two [31m  xxx")
    assert len(sent.message) == 4096
    assert sent.details["path"].startswith("a ba b")
    assert len(sent.details["path"]) == 512


def test_the_largest_control_messages_fit() -> None:
    reply = ErrorReply(
        ErrorCode.REQUEST, "😀" * 4096, 2**53 - 1, {f"{i:064}": "😀" * 512 for i in range(16)}
    )
    hello = dataclasses.replace(
        EDGE_HELLO,
        software="😀" * 128,
        codecs=("c" * 16,) * 32,
        capabilities=("k" * 64,) * 64,
        token="t" * 256,
    )
    for message in (reply, hello):
        frame = frame_of(message)
        assert len(frame) < 2**16
        assert decode(frame, LIMITS) == message


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (EDGE_HELLO, "token"),
        (OpenSession(7, 4096, "bf16", "fp16", "s3cr3t"), "resume"),
        (SessionOpened(7, 4096, 12, "s3cr3t"), "resume"),
    ],
)
def test_a_token_is_not_shown(message: Any, field: str) -> None:
    assert getattr(message, field) == "s3cr3t"
    assert "s3cr3t" not in f"{message!r} {message}"
    with pytest.raises(LocalProtocolError) as caught:
        encode(dataclasses.replace(message, **{field: "s3cr3t with spaces"}))
    assert "s3cr3t" not in str(caught.value)


# Frames that nobody should send


@each_sample
def test_a_frame_cut_off_anywhere_is_refused(message: Message) -> None:
    content = content_of(message)
    for length in range(len(content)):
        assert isinstance(outcome(content[:length]), RemoteProtocolError)


@each_sample
@pytest.mark.parametrize("extra", [b"\0", b"\xc0", bytes(16), bytes(64)])
def test_a_frame_with_something_behind_it_is_refused(message: Message, extra: bytes) -> None:
    assert isinstance(outcome(content_of(message) + extra), RemoteProtocolError)


@each_sample
def test_any_byte_may_be_wrong(message: Message) -> None:
    frame = content_of(message)
    for position in range(len(frame)):
        original = frame[position]
        for wrong in {0, 1, 0x7F, 0xFF, *(original ^ 1 << bit for bit in range(8))} - {original}:
            frame[position] = wrong
            result = outcome(frame)
            assert result != message
        frame[position] = original


@given(st.binary(max_size=200))
@example(b"")
@example(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
@settings(max_examples=300, deadline=None)
def test_random_bytes(frame: bytes) -> None:
    outcome(frame)


@given(st.sampled_from(sorted(TYPES.values())), st.binary(max_size=200), st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_bytes_with_a_good_prelude(number: int, rest: bytes, magic: bool) -> None:
    if magic:
        rest = b"PrivLoRA" + rest
    outcome(struct.pack("<BBHI", number, 0, PROTOCOL_VERSION, len(rest)) + rest)


def test_random_step_headers() -> None:
    rng = random.Random(1)
    for message in (BEGIN, EXCHANGE):
        good = content_of(message)
        for _ in range(3000):
            frame = bytearray(good)
            for _ in range(rng.randint(1, 3)):
                # Whole fields at a time, with the values that arithmetic goes wrong at.
                offset = 4 * rng.randrange(2, len(frame) // 4)
                value = rng.choice([0, 1, 2**16, 2**31, 2**32 - 1, rng.getrandbits(32)])
                struct.pack_into("<I", frame, offset, value)
            outcome(frame)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.builds(MSGPACK.ExtType, st.integers(0, 127), st.binary(max_size=20))
    | st.sampled_from(["edge", "fp16", "request", "a" * 64]),
    lambda children: (
        st.lists(children, max_size=5) | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=10,
)
control_kinds = st.sampled_from(
    [
        *(Hello, ErrorReply, OpenSession, SessionOpened, CloseSession, SessionClosed, Ping, Pong),
        DropStep,
    ]
)


@given(control_kinds, st.lists(values, max_size=11) | values)
@settings(max_examples=300, deadline=None)
def test_any_messagepack_as_a_header(kind: type[Message], fields: object) -> None:
    outcome(control_frame(kind, MSGPACK.packb(fields)))


HELLO_FIELDS: list[object] = [
    *("edge", "p", "a" * 64, "b" * 64, "c" * 64, ["fp16"], 2**20, 0, 0, [], "s3cr3t"),
]
ERROR_FIELDS: list[object] = ["request", "no", 3, {"key": "value"}]
OPEN_FIELDS: list[object] = [7, 4096, "bf16", "fp16", "r3sume", False]
TRAINING_FIELDS: list[object] = [7, 4096, "bf16", "fp16", None, True]


WRONG_FIELDS: list[tuple[type[Message], list[object], int, Iterable[object]]] = [
    (Hello, HELLO_FIELDS, 0, ["EDGE", "", 1, None, b"edge", ["edge"]]),
    (Hello, HELLO_FIELDS, 1, ["x" * 129, "a\nb", "\x9b", 1, None]),
    (Hello, HELLO_FIELDS, 2, ["a" * 63, "A" * 64, "a" * 64 + "\n", 1]),
    (Hello, HELLO_FIELDS, 3, ["", "g" * 64, None]),
    (Hello, HELLO_FIELDS, 4, ["b" * 65, ["b"], 0]),
    (Hello, HELLO_FIELDS, 5, ["fp16", ["x" * 17], [""], ["FP"], [1], ["a\0"], {"fp16": "x"}]),
    (Hello, HELLO_FIELDS, 5, [["fp16"] * 33]),
    (Hello, HELLO_FIELDS, 6, [2**17 - 1, 2**53, -1, 2.0**20, True]),
    (Hello, HELLO_FIELDS, 7, [-1, 2**32, False, "1", None]),
    (Hello, HELLO_FIELDS, 8, [-1, 2**32, 1.5]),
    (Hello, HELLO_FIELDS, 9, [None, ["x" * 65], ["x"] * 65, [[]]]),
    (Hello, HELLO_FIELDS, 10, ["", "x" * 257, "a b", "a\n", "\x7f", "\xe9", 1, False, ["s3cr3t"]]),
    (Hello, HELLO_FIELDS, 0, ["cloud"]),  # which has no token
    (ErrorReply, ERROR_FIELDS, 0, ["oops", 3, None]),
    (ErrorReply, ERROR_FIELDS, 1, ["x" * 4097, "a\x1b[2J", None]),
    (ErrorReply, ERROR_FIELDS, 2, [-1, 2**53, "3", True, 3.0]),
    (ErrorReply, ERROR_FIELDS, 3, [[], None, {"k": 1}, {"K K": "v"}, {"k": "\r"}, {b"": "v"}]),
    (ErrorReply, ERROR_FIELDS, 3, [{f"k{i}": "v" for i in range(17)}, {"k": "v" * 513}]),
    (OpenSession, OPEN_FIELDS, 0, [-1, 2**53, None, False, "7", [7]]),
    (OpenSession, OPEN_FIELDS, 1, [0, 2**32, None, 1.0]),
    (OpenSession, OPEN_FIELDS, 2, ["", "fp 16", 16, None, "fp16\0"]),
    (OpenSession, OPEN_FIELDS, 3, ["x" * 17, b"fp16"]),
    (OpenSession, OPEN_FIELDS, 4, ["", "a b", 1, False, "x" * 257]),
    (OpenSession, OPEN_FIELDS, 5, [0, 1, None, "false", [], True]),  # which resumes nothing
    (OpenSession, TRAINING_FIELDS, 1, [0, 2**32]),
    (OpenSession, TRAINING_FIELDS, 4, ["r3sume"]),
    (OpenSession, TRAINING_FIELDS, 5, [1, 2, "true", b"true"]),
    (SessionOpened, [7, 1, 0, None], 1, [0, -5, True]),
    (SessionOpened, [7, 12, 12, "r3sume"], 2, [13, -1, None, 1.0]),
    (SessionOpened, [7, 12, 12, "r3sume"], 3, ["", "a b", 7, "x" * 257]),
    (CloseSession, [7], 0, [2**53, -1, True, MSGPACK.ExtType(1, b"7")]),
    (SessionClosed, [7], 0, [2**53, None, MSGPACK.Timestamp(7)]),
    (Ping, [7], 0, [2**53, -1, None, 1.0]),
    (Pong, [7], 0, [2**53, -1, True]),
    (DropStep, [7, 9], 0, [2**53, -1, True, None, "7"]),
    (DropStep, [7, 9], 1, [2**53, -1, False, None, 9.0]),
]


@pytest.mark.parametrize(
    ("kind", "fields", "index", "wrong"),
    [
        (kind, fields, index, wrong)
        for kind, fields, index, wrongs in WRONG_FIELDS
        for wrong in wrongs
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else repr(value)[:20],
)
def test_a_wrong_field_is_refused(
    kind: type[Message], fields: list[object], index: int, wrong: object
) -> None:
    decode(sealed(control_frame(kind, MSGPACK.packb(fields))), LIMITS)
    changed = [*fields[:index], wrong, *fields[index + 1 :]]
    result = outcome(control_frame(kind, MSGPACK.packb(changed)))
    assert isinstance(result, RemoteProtocolError)
    assert kind.__name__ in str(result)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Hello, HELLO_FIELDS),
        (ErrorReply, ERROR_FIELDS),
        (OpenSession, OPEN_FIELDS),
        (DropStep, [7, 9]),
    ],
)
def test_a_wrong_number_of_fields_is_refused(kind: type[Message], fields: list[object]) -> None:
    for wrong in (fields[:-1], [*fields, 0], [], {"fields": fields}, "fields", None):
        result = outcome(control_frame(kind, MSGPACK.packb(wrong)))
        assert isinstance(result, RemoteProtocolError)


def hostile_headers() -> list[bytes]:
    nesting = 2**15
    return [
        b"\xdd\xff\xff\xff\xff",  # array of 2**32 - 1
        b"\xdd\x00\x40\x00\x00",  # array of 2**22
        b"\xdf\xff\xff\xff\xff",  # map
        b"\xdf\x00\x40\x00\x00",
        b"\xdb\xff\xff\xff\xff",  # string
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\x01",  # extension
        b"\x91" * nesting,
        b"\x91" * nesting + b"\xc0",
        b"\xdd\x00\x00\x00\x40" + (b"\xdc\x00\x40" + b"\x90" * 64) * 64,
        b"\xdb\x00\x00\xf0\x00" + b"x" * 0xF000,
        b"\xc1",
        b"\xa2\xff\xff",
        b"\x82\xa1a\x01\xa1a\x01",
        b"\x81\x90\x90",
    ]


@pytest.mark.parametrize("header", hostile_headers(), ids=lambda header: header[:6].hex())
@pytest.mark.parametrize("kind", [Hello, CloseSession])
def test_a_hostile_header_costs_little_memory(kind: type[Message], header: bytes) -> None:
    frame = control_frame(kind, header)
    tracemalloc.start()
    try:
        result = outcome(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(result, RemoteProtocolError)
    assert peak < 2**20


def test_a_header_over_64_kib_is_refused_unread() -> None:
    result = outcome(control_frame(CloseSession, b"\xc0" * (2**16 + 1)))
    assert isinstance(result, RemoteProtocolError)
    assert "too large" in str(result)


@pytest.mark.parametrize(
    ("message", "offset", "layout", "value", "reason"),
    [
        (EXCHANGE, 1, "B", 1, "flags"),
        (EXCHANGE, 2, "H", 2, "version 2"),
        (EXCHANGE, 4, "I", 2**32 - 1, "header"),
        (EXCHANGE, 8, "Q", 2**53, "id"),
        (EXCHANGE, 16, "Q", 2**64 - 1, "id"),
        (EXCHANGE, 28, "I", 1, "reserved"),
        (EXCHANGE, 32, "I", 2**20 + 1, "1048577"),
        (EXCHANGE, 36, "I", 2**32 - 1, "4294967295"),
        (EXCHANGE, 40, "Q", 2**64 - 1, "declares 18446744073709551615 bytes"),
        (EXCHANGE, 40, "Q", 23, "declares 23 bytes of tensor data, the frame has 24"),
        (EXCHANGE, 48, "16s", b"", "codec"),
        (EXCHANGE, 48, "16s", b"FP16", "codec"),
        (EXCHANGE, 48, "16s", b"fp\x0016", "codec"),
        (EXCHANGE, 48, "16s", b"\xfffp16", "codec"),
        (StepEnd(7, 9, payload()), 24, "I", 1, "reserved"),
        (BEGIN, 8, "Q", 2**53, "id"),
        (BEGIN, 28, "I", 3, "output_rows"),
        (BEGIN, 32, "I", 0, "no rows"),
        (BEGIN, 32, "I", 1, "opening has 2 rows"),
        (BEGIN, 40, "Q", 2**64 - 1, "declares"),
        (BEGIN, 40, "Q", 11, "padding"),
        (BEGIN, 64, "I", 1, "opening has 1 rows"),
        (BEGIN, 68, "I", 2**20 + 1, "1048577"),
        (BEGIN, 72, "Q", 2**63, "declares"),
        (BEGIN, 72, "Q", 15, "declares"),
        (BEGIN, 80, "16s", b"", "codec"),
        (BEGIN, 64, "32s", b"", "declares"),
        (BEGIN, 108, "B", 1, "padding"),
    ],
)
def test_a_wrong_step_field_is_refused(
    message: Message, offset: int, layout: str, value: int | bytes, reason: str
) -> None:
    frame = content_of(message)
    struct.pack_into(f"<{layout}", frame, offset, value)
    result = outcome(frame)
    assert isinstance(result, RemoteProtocolError)
    assert reason in str(result)
    assert type(message).__name__ in str(result) or reason == "codec"


def test_tighter_limits_are_kept() -> None:
    limits = WireLimits(max_rows=2, max_features=6)
    assert decode(frame_of(EXCHANGE), limits) == EXCHANGE
    for shape in ((3, 6), (2, 7)):
        wide = ExchangeRequest(7, 9, 3, payload(*shape))
        with pytest.raises(RemoteProtocolError, match="2 x 6"):
            decode(frame_of(wide), limits)


# Damage on the way


@each_sample
def test_a_flipped_bit_is_noticed(message: Message) -> None:
    frame = frame_of(message)
    for position in range(len(frame)):
        for bit in range(8):
            frame[position] ^= 1 << bit
            with pytest.raises((RemoteProtocolError, VersionMismatch)):
                decode(frame, LIMITS)
            frame[position] ^= 1 << bit
    assert decode(frame, LIMITS) == message


# Versions


@given(st.binary(max_size=300), st.sampled_from([1, 2]), st.integers(0, 2**16 - 1))
@settings(deadline=None)
def test_another_version_is_recognised_whatever_follows(
    rest: bytes, number: int, version: int
) -> None:
    frame = struct.pack("<BBHI8s", number, 77, version, 2**31, b"PrivLoRA") + rest
    if version == PROTOCOL_VERSION:
        assert isinstance(outcome(frame), RemoteProtocolError)
        return
    with pytest.raises(VersionMismatch) as caught:
        decode(memoryview(frame), LIMITS)
    assert f"version {version}" in str(caught.value)
    assert f"version {PROTOCOL_VERSION}" in str(caught.value)


def test_without_the_mark_it_is_no_version_of_this_protocol() -> None:
    frame = content_of(EDGE_HELLO)
    frame[2] = 9
    frame[8] = ord("p")
    result = outcome(frame)
    assert isinstance(result, RemoteProtocolError)
    assert "PrivateLoRA" in str(result)


# What this end must not send


FLOATS: Any = memoryview(bytes(8)).cast("f")


@pytest.mark.parametrize(
    "message",
    [
        dataclasses.replace(EDGE_HELLO, software="x" * 129),
        dataclasses.replace(EDGE_HELLO, software="\ud800"),
        dataclasses.replace(EDGE_HELLO, fingerprints=Fingerprints("m", "p", "b")),
        dataclasses.replace(EDGE_HELLO, codecs=("Fp16",)),
        dataclasses.replace(EDGE_HELLO, max_frame_nbytes=1000),
        ErrorReply(ErrorCode.REQUEST, "x", -1),
        ErrorReply(ErrorCode.REQUEST, "x", None, {"Bad Key": "x"}),
        OpenSession(2**53, 1, "fp16", "fp16"),
        OpenSession(1, 0, "fp16", "fp16"),
        OpenSession(1, 1, "a codec", "fp16"),
        OpenSession(1, 1, "fp16", "fp16", "r3sume", training=True),
        DropStep(2**53, 0),
        DropStep(0, -1),
        CloseSession(-1),
        ExchangeRequest(2**53, 0, 0, payload()),
        ExchangeRequest(0, -1, 0, payload()),
        ExchangeRequest(0, 0, 2**32, payload()),
        ExchangeRequest(0, 0, -1, payload()),
        ExchangeRequest(0, 0, 0, payload(codec="")),
        ExchangeRequest(0, 0, 0, payload(codec="x" * 17)),
        ExchangeRequest(0, 0, 0, TensorPayload("fp16", (2**32, 1), b"")),
        ExchangeRequest(0, 0, 0, TensorPayload("fp16", (1, 4), FLOATS)),
        ExchangeRequest(0, 0, 0, TensorPayload("fp16", (1, 4), memoryview(bytes(16))[::2])),
        StepBegin(0, 0, 2**32, OutputRows.ALL, payload(), None),
        StepBegin(2**53, 0, 0, OutputRows.ALL, payload(), None),
        StepBegin(0, 0, 0, OutputRows.ALL, payload(0), None),
        StepBegin(0, 0, 0, OutputRows.ALL, payload(2), payload(1)),
    ],
    ids=name_of,
)
def test_what_no_peer_would_accept_is_not_sent(message: Message) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        encode(message)
    assert len(str(caught.value).splitlines()) == 1


def test_only_messages_are_sent() -> None:
    with pytest.raises(LocalProtocolError, match="dict"):
        encode({"session_id": 1})  # type: ignore[arg-type]
