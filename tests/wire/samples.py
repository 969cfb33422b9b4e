"""Messages for the tests: one of each kind, and strategies for all of them."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

from hypothesis import strategies as st

from privatelora.errors import RemoteProtocolError, VersionMismatch
from privatelora.runtime.wire.codec import decode, encode, seal
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    BatchSequence,
    CloseSession,
    DropStep,
    ErrorCode,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    Fingerprints,
    GradientReply,
    GradientRequest,
    Hello,
    Message,
    OpenSession,
    OutputRows,
    Ping,
    Pong,
    Role,
    SessionClosed,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import WireLimits

LIMITS = WireLimits()

PRINTS = Fingerprints("a" * 64, "b" * 64, "c" * 64)
EDGE_HELLO = Hello(Role.EDGE, "privatelora 0.1", PRINTS, ("bf16", "fp32"), 2**20, token="s3cr3t")
CLOUD_HELLO = Hello(
    Role.CLOUD, "privatelora 0.1", PRINTS, ("fp32", "bf16"), 2**21, 4096, 8, ("resume", "x.y-1")
)


def payload(rows: int = 1, features: int = 3, codec: str = "fp16") -> TensorPayload:
    data = bytes(i % 251 + 1 for i in range(2 * rows * features))
    return TensorPayload(codec, (rows, features), data)


def name_of(message: Message) -> str:
    """Its repr, without what differs between processes."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(message))


SAMPLES: tuple[Message, ...] = (
    EDGE_HELLO,
    CLOUD_HELLO,
    ErrorReply(ErrorCode.CAPACITY, "all 8 sessions are taken: try later", 7, {"limit": "8"}),
    ErrorReply(ErrorCode.VERSION, "versions differ"),
    OpenSession(7, 4096, "bf16", "fp16"),
    OpenSession(8, 4096, "bf16", "fp16", "a-token_of.8"),
    OpenSession(9, 4096, "bf16", "fp16", training=True),
    SessionOpened(7, 4096),
    SessionOpened(8, 4096, 12, "another-token"),
    CloseSession(7),
    SessionClosed(2**53 - 1),
    Ping(7),
    Pong(2**53 - 1),
    StepBegin(7, 9, 12, OutputRows.LAST, payload(2, 3), payload(2, 4, "bf16")),
    StepBegin(7, 10, 14, OutputRows.NONE, payload(1, 5), None),
    ExchangeRequest(7, 9, 3, payload(2, 6)),
    ExchangeReply(7, 9, 3, payload(2, 9, "int4.g64+lz4")),
    StepEnd(7, 9, payload(1, 3)),
    StepEnd(7, 10, payload(0, 3)),
    TrainBegin(9, 0, (BatchSequence(2, 1),), True, payload(2, 3), payload(2, 4, "bf16")),
    TrainBegin(9, 1, (BatchSequence(1, 1), BatchSequence(2, 0)), True, payload(3, 3), None),
    TrainBegin(9, 2, (BatchSequence(1, 1),) * 3, False, payload(3, 5), payload(3, 1, "int8+lz4")),
    TrainBegin(9, 3, (BatchSequence(1, 0),), False, payload(1, 3), None),
    BackwardBegin(9, 0, payload(1, 3)),
    BackwardBegin(9, 2**53 - 1, payload(0, 3)),
    GradientRequest(9, 0, 3, payload(2, 9, "bf16")),
    GradientReply(9, 0, 3, payload(2, 6, "int4.g64+lz4")),
    BackwardEnd(9, 0, payload(2, 4, "bf16"), payload(2, 3)),
    BackwardEnd(9, 1, payload(2, 5), None),
    BackwardEnd(9, 2, None, payload(3, 3)),
    BackwardEnd(9, 3, None, None),
    DropStep(9, 2**53 - 1),
)


def frame_of(message: Message) -> memoryview:
    return memoryview(bytearray(b"".join(encode(message))))


def content_of(message: Message) -> bytearray:
    """Its frame without the checksum, to be spoilt and sealed again."""
    return bytearray(frame_of(message)[:-4])


def sealed(content: bytes | bytearray) -> memoryview:
    return memoryview(bytearray(b"".join(seal((content,)))))


def outcome(content: bytes | bytearray) -> Message | RemoteProtocolError | VersionMismatch:
    """What decoding gives of a frame with the checksum of this content.

    Any other exception fails the test.
    """
    try:
        return decode(sealed(content), LIMITS)
    except (RemoteProtocolError, VersionMismatch) as error:
        reason = str(error)
        assert reason
        assert len(reason.splitlines()) == 1
        assert len(reason) < 400
        return error


# Strategies

ids = st.integers(0, 2**53 - 1)
uint32 = st.integers(0, 2**32 - 1)
positive_uint32 = st.integers(1, 2**32 - 1)
texts = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=30)


def names(max_size: int) -> st.SearchStrategy[str]:
    alphabet = string.ascii_lowercase + string.digits + "_.+-"
    return st.text(alphabet, max_size=max_size - 1).map("c".__add__)


codecs = names(16)
tokens = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1)
any_rows = st.integers(0, 2**20)
wrappers: st.SearchStrategy[Callable[[bytes], bytes | bytearray | memoryview]] = st.sampled_from(
    [bytes, bytearray, memoryview]
)


@st.composite
def payloads(draw: st.DrawFn, rows: st.SearchStrategy[int]) -> TensorPayload:
    data = draw(wrappers)(draw(st.binary(max_size=200)))
    shape = (draw(rows), draw(st.integers(0, 2**20)))
    return TensorPayload(draw(codecs), shape, data)


@st.composite
def hellos(draw: st.DrawFn) -> Hello:
    role = draw(st.sampled_from(Role))
    fingerprints = st.text("0123456789abcdef", min_size=64, max_size=64)
    return Hello(
        role=role,
        software=draw(texts),
        fingerprints=Fingerprints(draw(fingerprints), draw(fingerprints), draw(fingerprints)),
        codecs=tuple(draw(st.lists(codecs, max_size=32))),
        max_frame_nbytes=draw(st.integers(2**17, 2**53 - 1)),
        max_positions=draw(uint32),
        max_sessions=draw(uint32),
        capabilities=tuple(draw(st.lists(names(64), max_size=64))),
        token=draw(st.none() | tokens) if role is Role.EDGE else None,
    )


@st.composite
def step_begins(draw: st.DrawFn) -> StepBegin:
    rows = st.just(draw(st.integers(1, 2**20)))
    return StepBegin(
        draw(ids),
        draw(ids),
        draw(uint32),
        draw(st.sampled_from(OutputRows)),
        draw(payloads(rows)),
        draw(st.none() | payloads(rows)),
    )


@st.composite
def sequences(draw: st.DrawFn) -> BatchSequence:
    # Of as many as there are below, a batch has no more rows than are accepted.
    num_rows = draw(st.integers(1, 2**16))
    return BatchSequence(num_rows, draw(st.integers(0, num_rows)))


@st.composite
def train_begins(draw: st.DrawFn) -> TrainBegin:
    batch = tuple(draw(st.lists(sequences(), min_size=1, max_size=16)))
    rows = st.just(sum(sequence.num_rows for sequence in batch))
    return TrainBegin(
        draw(ids),
        draw(ids),
        batch,
        draw(st.booleans()),
        draw(payloads(rows)),
        draw(st.none() | payloads(rows)),
    )


messages: st.SearchStrategy[Message] = st.one_of(
    hellos(),
    st.builds(
        ErrorReply,
        code=st.sampled_from(ErrorCode),
        message=texts,
        session_id=st.none() | ids,
        details=st.dictionaries(names(64), texts, max_size=16),
    ),
    st.builds(OpenSession, ids, positive_uint32, codecs, codecs, st.none() | tokens),
    st.builds(OpenSession, ids, positive_uint32, codecs, codecs, training=st.just(True)),
    st.builds(SessionOpened, ids, positive_uint32),
    st.builds(CloseSession, ids),
    st.builds(SessionClosed, ids),
    st.builds(Ping, ids),
    st.builds(Pong, ids),
    step_begins(),
    st.builds(ExchangeRequest, ids, ids, uint32, payloads(any_rows)),
    st.builds(ExchangeReply, ids, ids, uint32, payloads(any_rows)),
    st.builds(StepEnd, ids, ids, payloads(any_rows)),
    train_begins(),
    st.builds(BackwardBegin, ids, ids, payloads(any_rows)),
    st.builds(GradientRequest, ids, ids, uint32, payloads(any_rows)),
    st.builds(GradientReply, ids, ids, uint32, payloads(any_rows)),
    st.builds(
        BackwardEnd, ids, ids, st.none() | payloads(any_rows), st.none() | payloads(any_rows)
    ),
    st.builds(DropStep, ids, ids),
)
