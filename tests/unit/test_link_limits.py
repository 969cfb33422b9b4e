"""What a link cannot do: silence, strangers, no room, numbers that do not fit."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Never

import pytest
import torch

from privatelora.errors import (
    CapacityError,
    ConfigError,
    ConnectError,
    ConnectionClosed,
    LocalProtocolError,
    PartitionError,
    PrivateLoRAError,
    RequestError,
    TransportTimeout,
)
from privatelora.runtime.generation import Context
from privatelora.runtime.split_model import SplitSequence
from privatelora.runtime.wire.messages import (
    ErrorCode,
    ErrorReply,
    Fingerprints,
    OpenSession,
    SessionOpened,
    StepBegin,
    StepEnd,
)
from privatelora.transports.base import Connection
from tests.unit.peers import RawCloud, raw_cloud, tensor
from tests.unit.waiting import Recorder, let_run
from tests.unit.world import FP16, FP32, PRINTS, ROOMY, assert_same, serving, solo, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [1, *range(20, 42)]


# A cloud that does not answer


async def say_nothing(cloud: RawCloud) -> None:
    await cloud.listen_on()


async def open_and_say_nothing(cloud: RawCloud) -> None:
    request = await cloud.hear(OpenSession)
    await cloud.say(SessionOpened(request.session_id, request.max_positions))
    await cloud.listen_on()


async def test_a_cloud_that_opens_no_session() -> None:
    recorder = Recorder(raw_cloud(say_nothing))
    async with serving(recorder) as address:
        model = world().split(address, step_timeout_s=0.01)
        for attempt in range(2):
            with pytest.raises(TransportTimeout, match=r"did not answer within 0.01 s"):
                await model.open_sequence(64)
            assert len(recorder.connections) == attempt + 1
        await model.aclose()


async def test_a_cloud_that_ends_no_step() -> None:
    async with serving(raw_cloud(open_and_say_nothing)) as address:
        model = world().split(address, step_timeout_s=0.01)
        sequence = await model.open_sequence(64)
        with pytest.raises(TransportTimeout, match="did not answer"):
            await sequence.forward(PROMPT, 0, "last")
        with pytest.raises(TransportTimeout):
            await sequence.forward(PROMPT, 0, "last")
        await sequence.aclose()
        await model.aclose()


async def test_a_cancelled_step_that_never_ends() -> None:
    async with serving(raw_cloud(open_and_say_nothing)) as address:
        model = world().split(address, step_timeout_s=0.01)
        sequence = await model.open_sequence(64)
        task = asyncio.create_task(sequence.forward(PROMPT, 0, "last"))
        await let_run(2)
        task.cancel()
        await asyncio.wait({task})
        with pytest.raises(TransportTimeout):
            await sequence.forward(PROMPT, 0, "last")
        await model.aclose()


async def test_what_a_cancelled_step_gave_is_not_taken_for_the_next_ones() -> None:
    async def end_and_give_up(cloud: RawCloud) -> None:
        request = await cloud.hear(OpenSession)
        await cloud.say(SessionOpened(request.session_id, request.max_positions))
        step = await cloud.hear(StepBegin)
        await cloud.say(StepEnd(0, step.step_id, tensor(1, step.hidden_states.shape[1])))
        await cloud.hear(StepBegin)
        await cloud.say(ErrorReply(ErrorCode.CAPACITY, "no more", 0))
        await cloud.listen_on()

    async with serving(raw_cloud(end_and_give_up)) as address:
        for num_turns in range(1, 8):
            model = world().split(address)
            sequence = await model.open_sequence(64)
            task = asyncio.create_task(sequence.forward(PROMPT, 0, "last"))
            await let_run(num_turns)
            task.cancel()
            await asyncio.wait({task})
            with pytest.raises(CapacityError, match="no more"):
                await sequence.forward(PROMPT, 0, "last")
            await model.aclose()


async def test_something_that_accepts_and_does_not_greet() -> None:
    async def accept(connection: Connection) -> None:
        await asyncio.Event().wait()

    async with serving(accept) as address:
        model = world().split(address, connect_timeout_s=0.01)
        with pytest.raises(TransportTimeout, match="is it a PrivateLoRA cloud"):
            await model.open_sequence(64)
        await model.aclose()


async def test_nothing_there() -> None:
    model = world().split("inproc://nobody")
    for _ in range(2):
        with pytest.raises(ConnectError, match="nobody"):
            await model.open_sequence(64)
    await model.aclose()


# Who belongs together


@pytest.mark.parametrize("what", ["model", "plan", "basis"])
async def test_shards_that_do_not_belong_together(what: str) -> None:
    split = world()
    async with serving(split.service().handle) as address:
        stranger = split.split(address, fingerprints=replace(PRINTS, **{what: "f" * 64}))
        others = "|".join({"model", "plan", "basis"} - {what})
        with pytest.raises(PartitionError, match=f"differ in {what} .*ffffffffffff") as caught:
            await stranger.open_sequence(64)
        assert f"differ in {others}" not in str(caught.value)
        friend = split.split(address)
        await (await friend.open_sequence(64)).aclose()
        await stranger.aclose()
        await friend.aclose()


async def test_every_difference_is_named() -> None:
    split = world()
    async with serving(split.service().handle) as address:
        stranger = split.split(address, fingerprints=Fingerprints("d" * 64, "e" * 64, "f" * 64))
        with pytest.raises(PartitionError, match=r"model .*plan .*basis "):
            await stranger.open_sequence(64)
        await stranger.aclose()


# Room


async def test_sessions_are_limited() -> None:
    split = world()
    async with serving(split.service(replace(ROOMY, max_sessions=2)).handle) as address:
        one, two = split.split(address), split.split(address)
        first, second = await one.open_sequence(8), await two.open_sequence(8)
        for model in (one, two):
            with pytest.raises(CapacityError, match="2 sessions already"):
                await model.open_sequence(8)
        assert_same(
            await first.forward(PROMPT[:8], 0, "all"), await solo(split.unsplit(), PROMPT[:8])
        )
        await second.aclose()
        third = await two.open_sequence(8)
        await one.aclose()  # without a word about its session
        fourth = await two.open_sequence(8)
        for sequence in (third, fourth):
            await sequence.forward(PROMPT[:8], 0, "last")
        await two.aclose()


async def test_cached_positions_are_limited() -> None:
    split = world()
    tokens = [*range(3, 51)]
    limits = replace(ROOMY, max_cached_positions=96)
    async with serving(split.service(limits).handle) as address:
        model = split.split(address, max_step_positions=64)
        first, second, third = [await model.open_sequence(64) for _ in range(3)]
        for sequence in (first, second):
            await sequence.forward(tokens, 0, "last")
        with pytest.raises(CapacityError, match="0 of 96 positions free and 16 more are needed"):
            await third.forward(tokens[:3], 0, "last")
        await first.aclose()
        fourth = await model.open_sequence(64)
        expected = await solo(split.unsplit(), tokens)
        assert_same(await fourth.forward(tokens, 0, "all"), expected)
        await second.forward(tokens[:1], 47, "last")
        await model.aclose()


async def test_positions_of_a_sequence_are_limited() -> None:
    split = world()
    limits = replace(ROOMY, max_positions=16)
    async with serving(split.service(limits).handle) as address:
        model = split.split(address)
        assert model.max_positions == 128  # nobody was asked yet
        context = await Context.open(model)
        assert (model.max_positions, context.max_positions) == (16, 16)
        with pytest.raises(RequestError, match="17 tokens do not fit the context of 16"):
            await context.advance(PROMPT[:17])
        await context.advance(PROMPT[:16])
        await context.aclose()
        link = await model.link()
        with pytest.raises(RequestError, match=r"17 positions is not possible.* up to 16"):
            await link.open_session(17)
        assert link.is_open
        await model.aclose()


async def test_a_codec_the_cloud_does_not_have() -> None:
    split = world()
    async with serving(split.service().handle) as address:
        model = split.split(address, codecs=replace(FP32, exchange_down="int3"))
        with pytest.raises(ConfigError, match=r"payload.down.exchange: .* not know int3; .*fp16"):
            await model.open_sequence(16)
        await model.aclose()


async def test_a_session_that_asks_for_a_codec_the_cloud_does_not_have() -> None:
    split = world()
    async with serving(split.service().handle) as address:
        model = split.split(address)
        link = await model.link()
        link.codecs = replace(FP32, exchange_down="int3")
        with pytest.raises(RequestError, match="cannot write int3"):
            await model.open_sequence(16)
        link.codecs = FP32
        await model.open_sequence(16)
        await model.aclose()


async def test_a_step_that_no_frame_holds() -> None:
    split = world(every=4, rank_down=32)
    limits = replace(ROOMY, max_frame_nbytes=2**17)
    tokens = [*range(3, 103)]
    expected = await solo(split.unsplit(), tokens)
    async with serving(split.service(limits).handle) as address:
        model = split.split(address, max_step_positions=1000)
        sequence = await model.open_sequence(128)
        assert model.max_step_positions == 70
        with pytest.raises(LocalProtocolError, match="send fewer rows at once"):
            await sequence.forward(tokens, 0, "all")
        assert_same(await sequence.forward(tokens[:70], 0, "all"), expected[:70])
        context = await Context.open(model, 128)
        assert_same(await context.advance(tokens), expected[-1])
        await model.aclose()


# Numbers that do not fit


async def test_an_answer_that_overflows_ends_that_sequence_only() -> None:
    base = world()
    weights = {
        (layer, target): m * (1e7 if layer else 1.0) for (layer, target), m in base.weights.items()
    }
    split = replace(base, weights=weights)
    expected = await solo(split.unsplit(), PROMPT)
    async with serving(split.service().handle) as address:
        model, careful = split.split(address, codecs=FP16), split.split(address)
        other = await careful.open_sequence(64)
        link = await model.link()
        link.codecs = FP32
        neighbour = SplitSequence(model.parts, model.access, split.matrices(), 64)
        await neighbour.open()
        link.codecs = FP16
        for sequence in (other, neighbour):
            await sequence.forward(PROMPT[:9], 0, "none")
        narrow = await model.open_sequence(64)
        with pytest.raises(ConfigError, match=r"fp16 cannot carry .*: use bf16 or fp32"):
            await narrow.forward(PROMPT, 0, "last")
        with pytest.raises(ConnectionClosed, match="fp16 cannot carry"):
            await narrow.forward(PROMPT, 0, "last")
        for sequence in (other, neighbour):  # of another link, and of the same
            logits = await sequence.forward(PROMPT[9:], 9, "all")
            torch.testing.assert_close(logits, expected[9:], rtol=1e-3, atol=1e-2)
        await model.aclose()
        await careful.aclose()


async def test_a_request_that_overflows_ends_that_sequence_only() -> None:
    split = world()
    name = "points.2.lora_A.weight"
    loud = replace(split, tensors={**split.tensors, name: split.tensors[name] * 1e7})
    async with serving(loud.service(replace(ROOMY, max_sessions=2)).handle) as address:
        model, other = split.split(address, codecs=FP16), split.split(address)
        careful, narrow = await other.open_sequence(64), await model.open_sequence(64)
        with pytest.raises(PrivateLoRAError, match="fp16 cannot carry"):
            await narrow.forward(PROMPT, 0, "last")
        with pytest.raises(ConnectionClosed, match="fp16 cannot carry"):
            await narrow.forward(PROMPT, 0, "last")
        await narrow.aclose()
        await model.open_sequence(64)  # its room was given back
        await careful.forward(PROMPT, 0, "last")
        await model.aclose()
        await other.aclose()


async def test_hidden_states_that_overflow_here_leave_the_sequence_usable() -> None:
    split = world()
    embed_tokens = split.tensors["model.embed_tokens.weight"].clone()
    embed_tokens[77] = 1e6
    loud = replace(split, tensors={**split.tensors, "model.embed_tokens.weight": embed_tokens})
    async with serving(split.service().handle) as address:
        model = loud.split(address, codecs=replace(FP32, hidden_states_up="fp16"))
        sequence = await model.open_sequence(64)
        with pytest.raises(ConfigError, match="fp16 cannot carry"):
            await sequence.forward([*PROMPT[:3], 77], 0, "last")
        logits = await sequence.forward(PROMPT, 0, "all")
        expected = await solo(split.unsplit(), PROMPT)
        torch.testing.assert_close(
            logits, expected, rtol=0, atol=0.05 * expected.abs().max().item()
        )
        await model.aclose()


async def test_an_answer_that_fails_unexpectedly_is_not_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    split = world()

    def fail(point: int, asked: object) -> Never:
        raise MemoryError("no memory for y")

    async with serving(split.service().handle) as address:
        model = split.split(address)
        sequence = await model.open_sequence(64)
        (await model.link())._answers = fail
        with pytest.raises(PrivateLoRAError, match="no memory for y"):
            await sequence.forward(PROMPT, 0, "last")
        assert "no memory for y" in caplog.text  # with its traceback
        fresh = await model.open_sequence(64)
        assert_same(await fresh.forward(PROMPT, 0, "all"), await solo(split.unsplit(), PROMPT))
        await model.aclose()
