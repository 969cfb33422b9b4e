"""A link or a cloud that is lost in the middle of a step costs time, and changes no gradient."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from privatelora.errors import (
    CloudDraining,
    ConnectionClosed,
    PrivateLoRAError,
    RemoteProtocolError,
    SessionEvicted,
    TransportTimeout,
)
from privatelora.runtime.training_session import TrainingLimits
from privatelora.runtime.wire.messages import (
    ErrorCode,
    ErrorReply,
    ExchangeRequest,
    OpenSession,
    SessionOpened,
    StepEnd,
    TrainBegin,
)
from privatelora.training.split.link import open_training_link
from tests.training.split_rig import (
    TRAINING,
    Central,
    Gradients,
    Trainer,
    assert_same_gradients,
    batch_of,
    training,
)
from tests.training.split_wire import Wires
from tests.unit.peers import RawCloud, raw_cloud, tensor
from tests.unit.world import PRINTS, World, world

BATCH = batch_of([9, 4, 12])
OTHER = batch_of([5, 11], seed=1)
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "two points, one folded": {"layers": "0-2"},
    "over both borders": {"every": 2, "edge_first": 1, "edge_last": 1},
}


def gone_through(split: World) -> Gradients:
    return Central(split, "llama").gradients(BATCH)


@pytest.mark.parametrize("options", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_wherever_the_link_is_cut_the_gradients_are_the_same(options: dict[str, Any]) -> None:
    """Before every message of both directions, of the way forward and of the way back."""
    split, wires = world("llama", **options), Wires()
    expected = gone_through(split)
    num_frames = 2 * 2 * (1 + len(split.plan.wire_points))
    with training(split, wrap=wires) as trainer:
        assert_same_gradients(trainer.gradients(BATCH), expected)
        for num_passed in range(num_frames):
            wires.after(num_passed)
            assert_same_gradients(trainer.gradients(BATCH), expected)
            assert wires.num_happened == num_passed + 1
            assert len(trainer.connections) == num_passed + 2


def test_it_may_be_cut_again_while_the_step_is_run_again() -> None:
    """In a greeting, while a session is opened, and on the way."""
    split, wires = world("llama", layers="0-2"), Wires()
    with training(split, wrap=wires) as trainer:
        trainer.gradients(BATCH)
        wires.after(3, 0, 3, 9)
        assert_same_gradients(trainer.gradients(BATCH), gone_through(split))
        assert wires.num_happened == 4


def test_a_kept_step_is_run_again_when_its_turn_comes() -> None:
    """The cut is between the two passes, with two steps kept: nobody is waiting then."""
    split = world("llama", layers="0-2")
    with training(split) as trainer:
        losses = [batch.loss(trainer.model) for batch in (BATCH, OTHER)]
        trainer.connections[-1].abort()
        for loss in losses:
            loss.backward()  # type: ignore[no-untyped-call]
        found = trainer.found()
    assert_same_gradients(found, Central(split, "llama").gradients(BATCH, OTHER))


def test_another_cloud_in_its_place_will_do(caplog: pytest.LogCaptureFixture) -> None:
    """One that has drained ends all steps, and the next takes them from their beginning."""
    split = world("llama", layers="0-2")
    with training(split) as trainer:
        loss = BATCH.loss(trainer.model)
        trainer.client.thread.run(trainer.service.drain(30.0))
        trainer.service = split.service(TRAINING)
        loss.backward()  # type: ignore[no-untyped-call]
        assert_same_gradients(trainer.found(), gone_through(split))
    assert [record for record in caplog.records if record.levelno > logging.WARNING] == []


def test_a_cloud_that_drains_in_the_middle_of_a_step(caplog: pytest.LogCaptureFixture) -> None:
    split, wires = world("llama", layers="0-2"), Wires()
    with training(split, wrap=wires) as trainer:
        for num_passed in (3, 9):  # forward, and back
            trainer.gradients(BATCH)
            wires.after(num_passed, what=lambda _: drain_and_replace(trainer))
            assert_same_gradients(trainer.gradients(BATCH), gone_through(split))
    assert [record for record in caplog.records if record.levelno > logging.WARNING] == []


def drain_and_replace(trainer: Trainer) -> None:
    """Begin to drain, as far as that goes without waiting, and let another cloud take over."""
    draining = trainer.service.drain(0.0)
    with pytest.raises(StopIteration):
        draining.send(None)
    trainer.service = trainer.split.service(TRAINING)


def test_patience_ends_and_the_next_step_begins_anew() -> None:
    split = world("llama", layers="0-2")
    with training(split, patience_s=0.2) as trainer:
        trainer.gradients(BATCH)
        drained, trainer.service = trainer.service, split.service(TRAINING)
        trainer.client.thread.run(drained.drain(0.0))
        trainer.client.thread.run(trainer.service.drain(0.0))
        with pytest.raises(CloudDraining):
            trainer.gradients(BATCH)
        trainer.service = split.service(TRAINING)
        assert_same_gradients(trainer.gradients(BATCH), gone_through(split))


def test_without_patience_a_lost_link_is_an_error() -> None:
    split, wires = world("llama", layers="0-2"), Wires()
    with training(split, wrap=wires, patience_s=0.0) as trainer:
        trainer.gradients(BATCH)
        wires.after(4)
        with pytest.raises(ConnectionClosed):
            trainer.gradients(BATCH)
        assert_same_gradients(trainer.gradients(BATCH), gone_through(split))


def test_a_trainer_whose_place_is_taken_each_time_gives_up() -> None:
    split, wires = world("llama", layers="0-2"), Wires()
    alone = TrainingLimits(max_rows=64, max_sessions=1)
    with training(split, replace(TRAINING, training=alone, min_idle_s=1e-6), wrap=wires) as trainer:
        trainer.gradients(BATCH)
        evict = EvictAll(trainer)
        for _ in range(4):
            wires.after(5, what=evict)
        with pytest.raises(SessionEvicted):
            trainer.gradients(BATCH)


class EvictAll:
    """Ends every trainer's session as if another needed its place."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, _connection: object) -> None:
        reason = SessionEvicted("this trainer was idle and another needs its place")
        self._trainer.service._training.end_all(reason)


# A cloud that says what it should not

WRONG: dict[str, str] = {
    "z of other rows": "a tensor of 26 x 24 came where 25 x 24 was due",
    "z of another size": "a tensor of 25 x 25 came where 25 x 24 was due",
    "another point": "the cloud said ExchangeRequest where ExchangeRequest of point 1 was due",
    "the end too early": "the cloud said StepEnd where ExchangeRequest of point 1 was due",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_cloud_that_says_what_it_should_not_is_left(what: str) -> None:
    """Bytes may be damaged on the way, so it is asked again; not for ever."""
    split = world("llama", layers="0-2")
    num_times = 0

    async def script(cloud: RawCloud) -> None:
        nonlocal num_times
        num_times += 1
        opened = await cloud.hear(OpenSession)
        await cloud.say(SessionOpened(opened.session_id, opened.max_positions, 0))
        begun = await cloud.hear(TrainBegin)
        ids = begun.session_id, begun.step_id
        match what:
            case "z of other rows":
                await cloud.say(ExchangeRequest(*ids, 1, tensor(26, 24)))
            case "z of another size":
                await cloud.say(ExchangeRequest(*ids, 1, tensor(25, 25)))
            case "another point":
                await cloud.say(ExchangeRequest(*ids, 2, tensor(25, 24)))
            case _:
                await cloud.say(StepEnd(*ids, tensor(25, 64)))
        await cloud.listen_on()

    with (
        training(split, wrap=lambda _: raw_cloud(script)) as trainer,
        pytest.raises(RemoteProtocolError, match=WRONG[what]),
    ):
        trainer.gradients(BATCH)
    assert num_times == 6


def test_a_cloud_that_fails_says_why_and_is_not_asked_again() -> None:
    split = world("llama", layers="0-2")
    num_times = 0

    async def script(cloud: RawCloud) -> None:
        nonlocal num_times
        num_times += 1
        opened = await cloud.hear(OpenSession)
        await cloud.say(SessionOpened(opened.session_id, opened.max_positions, 0))
        await cloud.hear(TrainBegin)
        await cloud.say(ErrorReply(ErrorCode.INTERNAL, "it is on fire", opened.session_id))
        await cloud.listen_on()

    with (
        training(split, wrap=lambda _: raw_cloud(script)) as trainer,
        pytest.raises(PrivateLoRAError, match="it is on fire"),
    ):
        trainer.gradients(BATCH)
    assert num_times == 1


def test_a_cloud_that_says_nothing_is_left() -> None:
    split = world("llama", layers="0-2")

    async def silent(cloud: RawCloud) -> None:
        await cloud.listen_on()

    with (
        training(split, wrap=lambda _: raw_cloud(silent), step_timeout_s=0.05) as trainer,
        pytest.raises(TransportTimeout, match=r"did not answer within 0\.05 s"),
    ):
        trainer.gradients(BATCH)


def test_a_link_that_failed_ends_whoever_waits_on_it() -> None:
    split = world("llama", layers="0-2")
    with training(split) as trainer:

        async def lose() -> None:
            link = await open_training_link(trainer.client_settings, PRINTS, 16)
            trainer.connections[-1].abort()
            _, step_id = link.new_step()
            with pytest.raises(ConnectionClosed):
                await link.hear(step_id)
            with pytest.raises(ConnectionClosed):
                link.new_step()
            await link.aclose()

        trainer.client.thread.run(lose())
