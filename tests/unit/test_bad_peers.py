"""What the other end says wrong is refused for what it is, and hurts nobody else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from privatelora.errors import (
    CapacityError,
    PrivateLoRAError,
    RemoteProtocolError,
    RequestError,
    VersionMismatch,
)
from privatelora.runtime import cloud_peer
from privatelora.runtime.wire.messages import (
    CloseSession,
    ErrorCode,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    Hello,
    Message,
    OpenSession,
    OutputRows,
    Role,
    SessionClosed,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from privatelora.transports.base import Connection, Limits
from privatelora.transports.registry import connect
from tests.unit.peers import RawCloud, RawEdge, raw_cloud, raw_edge, tensor
from tests.unit.world import PRINTS, ROOMY, World, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

TOKENS = [1, *range(20, 28)]
N = len(TOKENS)
ONE_SESSION = replace(ROOMY, max_sessions=1)
# The tiny model's hidden size, and with three targets and ranks of 8 the sizes of z and y.
HIDDEN, Z, Y = 64, 24, 24


async def assert_serves(split: World, address: str) -> None:
    """Its only session is free, and it computes what it should."""
    async with raw_edge(split, address) as edge:
        await edge.open(0)
        await edge.say(edge.begin(0, 0, 0, TOKENS))
        for _ in split.plan.wire_points:
            await edge.say(edge.answer(await edge.hear(ExchangeRequest)))
        end = await edge.hear(StepEnd)
        assert_same(edge.logits(end.hidden_states), await solo(split.unsplit(), TOKENS))


# To a cloud

BAD_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden size": ({"hidden_states": tensor(N, 65)}, f"hidden states of {N} x 65"),
    "no opening": ({"opening": None}, "must bring y of 1 layers"),
    "opening size": ({"opening": tensor(N, Y + 8)}, f"opening y of {N} x {Y + 8}"),
    "gap": ({"position": 1}, "position 1 of a sequence of 0"),
    "far away": ({"position": 2**32 - 1}, "position 4294967295 of a sequence of 0"),
    "codec": (
        {"hidden_states": TensorPayload("int3", (N, HIDDEN), bytes(N * HIDDEN))},
        "payload codec 'int3', which this end does not offer",
    ),
    "too few bytes": (
        {"hidden_states": TensorPayload("fp32", (N, HIDDEN), bytes(100))},
        "came as 100 bytes",
    ),
    "too many bytes": (
        {"opening": TensorPayload("fp16", (N, Y), bytes(4 * N * Y))},
        f"came as {4 * N * Y} bytes",
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
async def test_a_step_that_is_wrong_ends_the_connection(name: str) -> None:
    changes, message = BAD_STEPS[name]
    split = world()
    async with serving(split.service(ONE_SESSION).handle) as address:
        async with raw_edge(split, address) as edge:
            await edge.open(0)
            await edge.say(replace(edge.begin(0, 0, 0, TOKENS), **changes))
            error = await edge.hear_error()
        assert (error.code, error.session_id) == (ErrorCode.PROTOCOL, None)
        assert message in error.message
        await assert_serves(split, address)


async def test_an_opening_where_none_is_due() -> None:
    split = world(layers="2")
    step = StepBegin(0, 0, 0, OutputRows.LAST, tensor(N, HIDDEN), tensor(N, Y))
    async with serving(split.service().handle) as address, raw_edge(split, address) as edge:
        await edge.open(0)
        await edge.say(step)
        assert "must bring y of 0 layers" in (await edge.hear_error()).message


@pytest.mark.parametrize("rows", [0, N - 1, N + 1])
async def test_an_answer_of_other_rows(rows: int) -> None:
    await refused_answer(tensor(rows, Y), f"y of {rows} x {Y} came where {N} x {Y} was due")


async def test_an_answer_of_another_size() -> None:
    await refused_answer(tensor(N, Y + 1), f"y of {N} x {Y + 1} came where {N} x {Y} was due")


async def test_an_answer_in_an_unknown_codec() -> None:
    y = TensorPayload("int3", (N, Y), bytes(N * Y))
    await refused_answer(y, "payload codec 'int3'")


async def refused_answer(y: TensorPayload, message: str) -> None:
    split = world()
    async with serving(split.service(ONE_SESSION).handle) as address:
        async with raw_edge(split, address) as edge:
            await edge.open(0)
            await edge.say(edge.begin(0, 0, 0, TOKENS))
            request = await edge.hear(ExchangeRequest)
            await edge.say(ExchangeReply(0, 0, request.point, y))
            error = await edge.hear_error()
        assert (error.code, error.session_id) == (ErrorCode.PROTOCOL, None)
        assert message in error.message
        await assert_serves(split, address)


async def test_a_step_beyond_the_session_ends_the_session_only() -> None:
    split = world()
    async with (
        serving(split.service(replace(ROOMY, max_sessions=2)).handle) as address,
        raw_edge(split, address) as edge,
    ):
        await edge.open(0, max_positions=4)
        await edge.open(1)
        await edge.say(edge.begin(0, 0, 0, TOKENS))
        error = await edge.hear_error()
        assert (error.code, error.session_id) == (ErrorCode.REQUEST, 0)
        assert f"positions 0 to {N - 1} do not fit a sequence of 4" in error.message
        await edge.open(2)  # in place of the one that ended
        for session_id in (1, 2):
            await edge.say(edge.begin(session_id, 0, 0, TOKENS))
            assert (await edge.hear(ExchangeRequest)).session_id == session_id


async def test_rows_beyond_the_session_are_not_even_unpacked() -> None:
    rows = 2**15
    split = world()
    async with serving(split.service().handle) as address, raw_edge(split, address) as edge:
        await edge.open(0)
        bomb = TensorPayload("fp32+lz4", (rows, HIDDEN), bytes(rows * HIDDEN * 4 // 250))
        step = replace(edge.begin(0, 0, 0, TOKENS), hidden_states=bomb, opening=None)
        await edge.say(step)
        error = await edge.hear_error()
        assert (error.code, error.session_id) == (ErrorCode.REQUEST, 0)
        assert f"positions 0 to {rows - 1} do not fit" in error.message


async def test_what_an_edge_gives_up_is_free_again() -> None:
    split = world()
    async with (
        serving(split.service(ONE_SESSION).handle) as address,
        raw_edge(split, address) as edge,
    ):
        last_words: tuple[Message, ...] = (
            CloseSession(0),
            ErrorReply(ErrorCode.INTERNAL, "cannot go on", 1),
            CloseSession(2),
        )
        for session_id, last_word in enumerate(last_words):
            await edge.open(session_id)
            await edge.say(edge.begin(session_id, 0, 0, TOKENS))
            await edge.hear(ExchangeRequest)
            await edge.say(last_word)
            assert await edge.hear(SessionClosed) == SessionClosed(session_id)
        await edge.say(ErrorReply(ErrorCode.INTERNAL, "good bye"))
        await assert_serves(split, address)


@pytest.mark.parametrize("num_messages", range(3))
async def test_a_connection_that_drops_frees_its_sessions(num_messages: int) -> None:
    split = world()
    limits = replace(ROOMY, max_sessions=2, max_cached_positions=128)
    async with serving(split.service(limits).handle) as address:
        async with raw_edge(split, address) as edge:
            for session_id in range(2):
                await edge.open(session_id)
            for session_id in range(2):
                await edge.say(edge.begin(session_id, 0, 0, TOKENS))
                for _ in range(num_messages):
                    await edge.say(edge.answer(await edge.hear(ExchangeRequest)))
            edge.connection.abort()
        async with raw_edge(split, address) as edge:
            await edge.open(0, 64)
            await edge.open(1, 64)


async def test_words_that_are_no_messages(caplog: pytest.LogCaptureFixture) -> None:
    split = world()
    caplog.set_level(logging.INFO)
    async with serving(split.service().handle) as address:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"", bytes(8), bytes(100)):
            async with await connect(address, Limits()) as connection:
                await connection.send(words)
                assert b"PrivLoRA" in bytes(await connection.recv())  # an ErrorReply
        await assert_serves(split, address)
    # A stranger's nonsense is worth a line, not a traceback.
    assert not any(record.exc_info for record in caplog.records)


async def test_an_edge_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_peer, "HELLO_TIMEOUT_S", 0.01)
    async with (
        serving(world().service().handle) as address,
        await connect(address, Limits()) as connection,
    ):
        assert b"no Hello" in bytes(await connection.recv())


# To an edge


def ask(point: int, z: TensorPayload) -> Callable[[StepBegin], Message]:
    return lambda step: ExchangeRequest(step.session_id, step.step_id, point, z)


def end(hidden_states: TensorPayload) -> Callable[[StepBegin], Message]:
    return lambda step: StepEnd(step.session_id, step.step_id, hidden_states)


BAD_WORDS: dict[str, tuple[Callable[[StepBegin], Message], str]] = {
    "the folded point": (ask(0, tensor(N, Z)), "asked for point 0, which is not its own"),
    "a point that is none": (ask(4, tensor(N, Z)), "asked for point 4, which is not its own"),
    "z of too many rows": (ask(1, tensor(N + 1, Z)), f"z of {N + 1} x {Z} came where {N} x {Z}"),
    "z of too few rows": (ask(1, tensor(0, Z)), f"z of 0 x {Z}"),
    "z too wide": (ask(1, tensor(N, Z + 1)), f"z of {N} x {Z + 1}"),
    "z of too few bytes": (ask(1, TensorPayload("fp32", (N, Z), bytes(4))), "came as 4 bytes"),
    "z in no codec": (ask(1, TensorPayload("int3", (N, Z), bytes(N * Z))), "int3"),
    "no rows": (end(tensor(0, HIDDEN)), f"hidden states of 0 x {HIDDEN} came where 1 x {HIDDEN}"),
    "all rows": (end(tensor(N, HIDDEN)), f"hidden states of {N} x {HIDDEN}"),
    "hidden states too wide": (end(tensor(1, HIDDEN + 1)), f"hidden states of 1 x {HIDDEN + 1}"),
}


async def open_and_step(cloud: RawCloud) -> StepBegin:
    request = await cloud.hear(OpenSession)
    await cloud.say(SessionOpened(request.session_id, request.max_positions))
    return await cloud.hear(StepBegin)


async def step_against(
    script: Callable[[RawCloud], Coroutine[Any, Any, None]], error: type[PrivateLoRAError]
) -> str:
    """Run a step on a cloud that follows ``script``; what the error says."""

    async def follow(cloud: RawCloud) -> None:
        await script(cloud)
        await cloud.listen_on()

    async with serving(raw_cloud(follow)) as address:
        model = world().split(address, step_timeout_s=5)
        try:
            sequence = await model.open_sequence(64)
            with pytest.raises(error) as caught:
                await sequence.forward(TOKENS, 0, "last")
            await sequence.aclose()
        finally:
            await model.aclose()
    return str(caught.value)


@pytest.mark.parametrize("name", BAD_WORDS)
async def test_a_cloud_that_says_something_wrong(name: str) -> None:
    word, message = BAD_WORDS[name]

    async def script(cloud: RawCloud) -> None:
        await cloud.say(word(await open_and_step(cloud)))

    assert message in await step_against(script, RemoteProtocolError)


async def test_a_cloud_that_breaks_the_protocol_is_told() -> None:
    told: list[ErrorReply] = []

    async def script(cloud: RawCloud) -> None:
        await cloud.say(ask(1, tensor(1, 1))(await open_and_step(cloud)))
        told.append(await cloud.hear(ErrorReply))

    await step_against(script, RemoteProtocolError)
    assert [(reply.code, reply.session_id) for reply in told] == [(ErrorCode.PROTOCOL, None)]


async def test_a_frame_that_is_no_message() -> None:
    async def script(cloud: RawCloud) -> None:
        await open_and_step(cloud)
        await cloud.connection.send(b"nonsense")

    assert "PrivateLoRA" in await step_against(script, RemoteProtocolError)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (ErrorCode.CAPACITY, CapacityError),
        (ErrorCode.REQUEST, RequestError),
        (ErrorCode.INTERNAL, PrivateLoRAError),
    ],
)
@pytest.mark.parametrize("session_id", [0, None])
async def test_a_cloud_that_gives_up(
    code: ErrorCode, expected: type[PrivateLoRAError], session_id: int | None
) -> None:
    async def script(cloud: RawCloud) -> None:
        await open_and_step(cloud)
        await cloud.say(ErrorReply(code, "so it is", session_id))

    assert await step_against(script, expected) == "so it is"


async def greeted_by(words: bytes) -> None:
    """Connect to something that says this."""

    async def speak(connection: Connection) -> None:
        await connection.recv()
        await connection.send(words)

    async with serving(speak) as address:
        model = world().split(address)
        try:
            await model.open_sequence(8)
        finally:
            await model.aclose()


async def test_something_that_is_no_cloud() -> None:
    with pytest.raises(RemoteProtocolError, match="is the peer a PrivateLoRA program at all"):
        await greeted_by(b"HTTP/1.1 400 Bad Request")


async def test_a_cloud_of_another_version() -> None:
    wire = RawEdge(world(), None).wire  # type: ignore[arg-type]  # only for what it writes
    frame = bytearray(b"".join(wire.send(Hello(Role.EDGE, "newer", PRINTS, ("fp16",), 2**20))))
    frame[2:4] = (99).to_bytes(2, "little")
    with pytest.raises(VersionMismatch, match="version 99"):
        await greeted_by(bytes(frame))


async def test_an_edge_where_a_cloud_should_be() -> None:
    wire = RawEdge(world(), None).wire  # type: ignore[arg-type]  # only for what it writes
    frame = b"".join(wire.send(Hello(Role.EDGE, "another edge", PRINTS, ("fp16",), 2**20)))
    with pytest.raises(RemoteProtocolError, match="one end must be each"):
        await greeted_by(frame)
