"""Sessions for training on a cloud: what it refuses, whom that ends, and who goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.wire.codec import encode
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BatchSequence,
    DropStep,
    ErrorCode,
    ErrorReply,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    Message,
    OpenSession,
    OutputRows,
    SessionOpened,
    StepBegin,
    StepEnd,
    TensorPayload,
)
from tests.unit.peers import raw_edge, tensor
from tests.unit.training_peers import (
    HIDDEN,
    LENGTHS,
    LIMITS,
    WANTED,
    N,
    Y,
    back,
    backward,
    begin,
    forward,
    open_training,
    small,
    train,
    trainer,
)
from tests.unit.world import CPU, ROOMY, serving

pytestmark = pytest.mark.usefixtures("nothing_leaks")


# What the cloud says


async def test_a_cloud_says_in_its_greeting_whether_it_trains() -> None:
    split = small()
    for limits, capabilities in ((LIMITS, ("training",)), (ROOMY, ())):
        assert split.service(limits).hello.capabilities == capabilities
    async with serving(split.service(ROOMY).handle) as address, raw_edge(split, address) as edge:
        refused = await open_training(edge)
        assert isinstance(refused, ErrorReply)
        assert (refused.code, refused.session_id) == (ErrorCode.REQUEST, 0)
        assert "this cloud does not train" in refused.message
        await edge.open(1)  # a conversation is another thing


async def test_a_step_without_a_way_back_is_over_at_its_end() -> None:
    split = small()
    async with serving(split.service(LIMITS).handle) as address, trainer(split, address) as edge:
        for step_id in range(4):
            ended = await forward(edge, begin(step_id, backward=False))
            assert ended.hidden_states.shape == (WANTED, HIDDEN)
        await edge.connection.send(*encode(back(3)))
        error = await edge.hear_error()
    assert "step 3 of session 0 is not in flight" in error.message


async def test_no_rows_may_be_wanted() -> None:
    split = small()
    sequences = tuple(BatchSequence(length, 0) for length in LENGTHS)
    async with serving(split.service(LIMITS).handle) as address, trainer(split, address) as edge:
        ended = await forward(edge, begin(sequences=sequences))
        assert ended.hidden_states.shape == (0, HIDDEN)
        found = await backward(edge, BackwardBegin(0, 0, tensor(0, HIDDEN)))
        assert found.opening is not None
        assert not unpack(found.opening, CPU, torch.float32).any()


async def test_steps_go_back_in_any_order_and_whatever_is_dropped() -> None:
    split = small()
    async with serving(split.service(LIMITS).handle) as address, trainer(split, address) as edge:
        expected = await train(edge, 0)
        await forward(edge, begin(1))
        await forward(edge, begin(2))
        await edge.say(DropStep(0, 1))
        await forward(edge, begin(3))
        for step_id in (3, 2):
            ended = await backward(edge, back(step_id))
            assert ended.opening is not None
            assert torch.equal(unpack(ended.opening, CPU, torch.float32), expected)


async def test_trainers_do_not_see_each_other() -> None:
    split = small()
    async with serving(split.service(LIMITS).handle) as address, trainer(split, address) as edge:
        expected = await train(edge)
        assert isinstance(await open_training(edge, 1), SessionOpened)
        await forward(edge, begin(1))
        assert torch.equal(await train(edge, 0, session_id=1), expected)
        ended = await backward(edge, back(1))
        assert ended.opening is not None
        assert torch.equal(unpack(ended.opening, CPU, torch.float32), expected)


# What ends a session

TOO_MUCH: dict[str, tuple[list[int], str]] = {
    "more rows than it opened for": ([100, 101], "201 tokens came in a session for batches of 200"),
    "beyond the context": ([150, 257], "257 tokens is longer than the model's context of 256"),
}


@pytest.mark.parametrize(("lengths", "message"), TOO_MUCH.values(), ids=TOO_MUCH)
async def test_a_batch_that_is_too_large_ends_its_session_only(
    lengths: list[int], message: str
) -> None:
    split, rows = small(), sum(lengths)
    async with serving(split.service(LIMITS).handle) as address, raw_edge(split, address) as edge:
        await open_training(edge, 0, 200 if rows == 201 else 512)
        await open_training(edge, 1)
        await edge.say(
            begin(
                sequences=tuple(BatchSequence(length, 1) for length in lengths),
                hidden_states=tensor(rows, HIDDEN),
                opening=tensor(rows, Y),
            )
        )
        error = await edge.hear_error()
        assert (error.code, error.session_id) == (ErrorCode.REQUEST, 0)
        assert message in error.message
        await train(edge, session_id=1)
        assert isinstance(await open_training(edge, 2), SessionOpened), "in its place"


async def test_more_rows_than_this_cloud_takes_are_refused() -> None:
    split = small()
    async with serving(split.service(LIMITS).handle) as address, raw_edge(split, address) as edge:
        refused = await open_training(edge, 0, 513)
        assert isinstance(refused, ErrorReply)
        assert refused.code is ErrorCode.REQUEST
        assert "batches of 513 tokens are more than this cloud takes (512)" in refused.message


async def test_a_codec_that_cannot_carry_z_ends_the_session_only() -> None:
    split = small()
    infinite = pack(torch.full((N, HIDDEN), float("inf")), "fp32")
    async with serving(split.service(LIMITS).handle) as address, trainer(split, address) as edge:
        await edge.say(OpenSession(1, 512, "fp32", "int6", training=True))
        await edge.hear(SessionOpened)
        await edge.say(begin(session_id=1, hidden_states=infinite))
        error = await edge.hear_error()
        assert error.session_id == 1
        assert "int6" in error.message
        await train(edge)


# What ends a connection

BAD_BEGINNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden size": ({"hidden_states": tensor(N, 65)}, f"hidden states of {N} x 65"),
    "no opening": ({"opening": None}, "must bring y of 1 layers"),
    "opening size": ({"opening": tensor(N, Y + 1)}, f"opening y of {N} x {Y + 1}"),
    "codec": (
        {"hidden_states": TensorPayload("int3", (N, HIDDEN), bytes(N * HIDDEN))},
        "payload codec 'int3'",
    ),
    "too few bytes": (
        {"opening": TensorPayload("fp32", (N, Y), bytes(100))},
        "came as 100 bytes",
    ),
}
BAD_ANSWERS: dict[str, tuple[TensorPayload, str]] = {
    "rows": (tensor(N + 1, Y), f"of {N + 1} x {Y} came where {N} x {Y} was due"),
    "no rows": (tensor(0, Y), f"of 0 x {Y} came where {N} x {Y} was due"),
    "features": (tensor(N, Y - 1), f"of {N} x {Y - 1} came where {N} x {Y} was due"),
}


async def assert_ends_the_connection_only(*said: Message | str, expected: str) -> None:
    """What a trainer says ends its connection; another that is in the middle of a step goes on.

    ``said``: "forward" and "back" stand for a request of the cloud that is heard and left alone.
    """
    split = small()
    async with (
        serving(split.service(LIMITS).handle) as address,
        trainer(split, address) as other,
    ):
        expected_gradient = await train(other)
        await forward(other, begin(1))
        async with trainer(split, address) as edge:
            for message in said:
                if message == "forward":
                    await edge.hear(ExchangeRequest)
                elif message == "back":
                    await edge.hear(GradientRequest)
                elif message == "end":
                    for _ in split.plan.wire_points:
                        await edge.say(edge.answer(await edge.hear(ExchangeRequest)))
                    await edge.hear(StepEnd)
                else:
                    assert not isinstance(message, str)
                    await edge.say(message)
            error = await edge.hear_error()
        assert (error.code, error.session_id) == (ErrorCode.PROTOCOL, None)
        assert expected in error.message
        ended = await backward(other, back(1))
        assert ended.opening is not None
        assert torch.equal(unpack(ended.opening, CPU, torch.float32), expected_gradient)
        async with trainer(split, address) as edge:  # in place of the one that ended
            await train(edge)


@pytest.mark.parametrize(("changes", "message"), BAD_BEGINNINGS.values(), ids=BAD_BEGINNINGS)
async def test_a_step_that_is_wrong(changes: dict[str, Any], message: str) -> None:
    await assert_ends_the_connection_only(begin(**changes), expected=message)


@pytest.mark.parametrize(("y", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
async def test_an_answer_that_is_wrong(y: TensorPayload, message: str) -> None:
    await assert_ends_the_connection_only(
        begin(), "forward", ExchangeReply(0, 0, 1, y), expected=f"y {message}"
    )


@pytest.mark.parametrize(("z", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
async def test_a_gradient_of_z_that_is_wrong(z: TensorPayload, message: str) -> None:
    await assert_ends_the_connection_only(
        begin(), "end", back(), "back", GradientReply(0, 0, 2, z), expected=message
    )


@pytest.mark.parametrize("shape", [(N, HIDDEN), (WANTED - 1, HIDDEN), (WANTED, HIDDEN + 1)])
async def test_a_gradient_of_other_rows_than_were_wanted(shape: tuple[int, int]) -> None:
    await assert_ends_the_connection_only(
        begin(),
        "end",
        BackwardBegin(0, 0, tensor(*shape)),
        expected=f"a gradient of {shape[0]} x {shape[1]} came where {WANTED} x {HIDDEN} was due",
    )


async def test_a_step_of_a_conversation_in_a_session_for_training() -> None:
    split = small()
    step = StepBegin(0, 0, 0, OutputRows.LAST, tensor(N, HIDDEN), tensor(N, Y))
    async with serving(split.service(LIMITS).handle) as address, trainer(split, address) as edge:
        await edge.connection.send(*encode(step))
        assert "may not say StepBegin" in (await edge.hear_error()).message
