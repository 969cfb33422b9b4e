"""docs/PROTOCOL.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.payload.codec import decode as decode_tensor
from privatelora.runtime.wire import control
from privatelora.runtime.wire.codec import decode, encode
from privatelora.runtime.wire.messages import (
    PROTOCOL_VERSION,
    ErrorCode,
    ExchangeRequest,
    Message,
    OpenSession,
    OutputRows,
    StepBegin,
    TensorPayload,
)
from privatelora.runtime.wire.prelude import MAX_SESSIONS, MAX_STEPS, TYPES, WireLimits
from tests.wire.samples import SAMPLES, frame_of

TEXT = (Path(__file__).parents[2] / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")


def example(name: str) -> bytes:
    block = re.search(rf"```hex {name}\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    return bytes.fromhex("".join(line.partition("#")[0] for line in block[1].splitlines()))


def fp16(features: int, data: str) -> TensorPayload:
    return TensorPayload("fp16", (1, features), bytes.fromhex(data))


EXAMPLES: list[Message] = [
    OpenSession(7, 4096, "fp16", "fp16"),
    StepBegin(7, 0, 12, OutputRows.LAST, fp16(2, "003c00c0"), fp16(3, "000000380034")),
    ExchangeRequest(7, 0, 3, fp16(2, "003c00c0")),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_the_examples_are_what_they_say(message: Message) -> None:
    frame = example(type(message).__name__)
    assert decode(memoryview(frame), WireLimits()) == message
    assert b"".join(encode(message)) == frame


def test_the_numbers_in_the_examples_are_what_they_say() -> None:
    begin = EXAMPLES[1]
    assert isinstance(begin, StepBegin)
    assert begin.opening is not None
    for tensor, values in ((begin.hidden_states, [1, -2]), (begin.opening, [0, 0.5, 0.25])):
        decoded = decode_tensor(
            tensor.codec,
            tensor.shape,
            tensor.data,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        assert decoded.tolist() == [values]


def test_the_message_types_are_listed() -> None:
    listed = {name: int(number) for number, name in re.findall(r"^\| (\d+) \| `(\w+)`", TEXT, re.M)}
    assert listed == {kind.__name__: number for kind, number in TYPES.items()}
    assert f"# Protocol, version {PROTOCOL_VERSION}\n" in TEXT


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_headers_have_the_sizes_listed(message: Message) -> None:
    row = re.search(rf"^\| \d+ \| `{type(message).__name__}` \| \w+ \| (\d+) \|", TEXT, re.M)
    declared = int.from_bytes(frame_of(message)[4:8], "little")
    if row is not None:
        assert declared == int(row[1])
    else:
        assert declared == len(frame_of(message)) - 8


def test_the_bounds_are_those_of_the_code() -> None:
    text = " ".join(TEXT.split())
    for sentence in (
        f"at most {control.MAX_HEADER_NBYTES} bytes",
        f"the 8 bytes `{control.MAGIC.decode()}`",
        f"text of at most {control.MAX_SOFTWARE_CHARS} characters",
        f"at most {control.MAX_CODECS} payload codecs",
        f"of at most {control.MAX_CODEC_CHARS} characters",
        f"at least {control.MIN_FRAME_NBYTES}",
        f"at most {control.MAX_CAPABILITIES} names of at most {control.MAX_NAME_CHARS}",
        f"text of at most {control.MAX_MESSAGE_CHARS} characters",
        f"map of at most {control.MAX_DETAILS} entries",
        f"to texts of at most {control.MAX_DETAIL_CHARS}",
        f"At most {MAX_SESSIONS} may be open",
        f"At most {MAX_STEPS} may be in flight",
    ):
        assert sentence in text, sentence
    for code in ErrorCode:
        assert f"`{code.value}`" in TEXT
    for codec in CODEC_NAMES:
        assert f"`{codec}` (" in TEXT
