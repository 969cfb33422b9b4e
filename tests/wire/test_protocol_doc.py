"""docs/PROTOCOL.md says what the code does."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from privatelora.errors import RemoteProtocolError
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.payload.codec import decode as decode_tensor
from privatelora.runtime.payload.codec import encode as encode_tensor
from privatelora.runtime.wire import control, failures
from privatelora.runtime.wire.codec import decode, encode
from privatelora.runtime.wire.messages import (
    PROTOCOL_VERSION,
    BatchSequence,
    ErrorCode,
    ExchangeRequest,
    Message,
    OpenSession,
    OutputRows,
    StepBegin,
    TensorPayload,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import (
    MAX_PINGS,
    MAX_SEQUENCES,
    MAX_SESSIONS,
    MAX_STEPS,
    MAX_TRAINING_STEPS,
    TYPES,
    WireLimits,
)
from tests.wire.samples import SAMPLES, frame_of

CPU = torch.device("cpu")
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
    TrainBegin(
        8,
        0,
        (BatchSequence(1, 1), BatchSequence(2, 1)),
        True,
        TensorPayload("fp16", (3, 2), bytes.fromhex("003c00c0003800340000003c")),
        None,
    ),
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
            device=CPU,
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
        assert declared == len(frame_of(message)) - 8 - 4


def test_the_bounds_are_those_of_the_code() -> None:
    text = " ".join(TEXT.split())
    for sentence in (
        f"at most {control.MAX_HEADER_NBYTES} bytes",
        f"the 8 bytes `{control.MAGIC.decode()}`",
        f"text of at most {control.MAX_SOFTWARE_CHARS} characters",
        f"1 to {control.MAX_TOKEN_CHARS} printable ASCII characters",
        f"at most {control.MAX_CODECS} payload codecs",
        f"of at most {control.MAX_CODEC_CHARS} characters",
        f"at least {control.MIN_FRAME_NBYTES}",
        f"at most {control.MAX_CAPABILITIES} names of at most {control.MAX_NAME_CHARS}",
        f"text of at most {control.MAX_MESSAGE_CHARS} characters",
        f"map of at most {control.MAX_DETAILS} entries",
        f"to texts of at most {control.MAX_DETAIL_CHARS}",
        f"At most {MAX_SESSIONS} may be open",
        f"At most {MAX_STEPS} may be in flight",
        f"At most {MAX_PINGS} may wait",
        f"`sequences`, 1 to {MAX_SEQUENCES} of 8 bytes",
        f"most {MAX_TRAINING_STEPS} steps may be running or kept",
    ):
        assert sentence in text, sentence
    assert f"`{failures.RETRY_AFTER}`" in TEXT
    for code in ErrorCode:
        assert f"`{code.value}`" in TEXT


def test_the_codecs_are_listed() -> None:
    section = TEXT.partition("### Codecs")[2].partition("**")[0]
    lines = re.findall(r"^\| (`.*) \|$", section, re.M)
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in lines]
    names = [name for name, *_ in rows]
    assert (*names, *(f"{name}+lz4" for name in names)) == CODEC_NAMES
    assert "**`+lz4`**" in TEXT
    shape = (3, 150)
    for name, _, group, planes, largest_scale in rows:
        data = bytearray(encode_tensor(torch.zeros(shape), name).data)
        if not group:
            continue
        widths = [int(width) for width in planes.split(",")]
        row_nbytes = [2 * math.ceil(150 / int(group)), *(math.ceil(150 * w / 8) for w in widths)]
        assert len(data) == 3 * sum(row_nbytes)
        data[:2] = int(largest_scale, 16).to_bytes(2, "little")
        decode_tensor(name, shape, data, device=CPU, dtype=torch.float32)
        data[:2] = (int(largest_scale, 16) + 1).to_bytes(2, "little")
        with pytest.raises(RemoteProtocolError):
            decode_tensor(name, shape, data, device=CPU, dtype=torch.float32)


def test_the_example_of_a_codec_is_what_it_says() -> None:
    numbers = re.search(r"Data of the row ([-\d, ]+) in `int6`", TEXT)
    assert numbers is not None
    row = [float(number) for number in numbers[1].split(",")]
    assert encode_tensor(torch.tensor([row]), "int6").data == example("int6")
    result = decode_tensor("int6", (1, 5), example("int6"), device=CPU, dtype=torch.float32)
    assert result.tolist() == [row]
