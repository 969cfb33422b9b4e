"""An edge's models by name, their conversations' caches, and how many there may be at once."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
import torch

from privatelora.errors import (
    CapacityError,
    CloudDraining,
    ConnectError,
    ConnectionClosed,
    LocalProtocolError,
    PartitionError,
    PrivateLoRAError,
    RemoteProtocolError,
    RequestError,
    UnknownModel,
)
from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.generation import GenerationStats
from privatelora.runtime.sampling_params import SamplingParams
from tests.unit.fakes import FakeModel, fake_service
from tests.unit.waiting import settled
from tests.unit.world import world

pytestmark = pytest.mark.usefixtures("nothing_leaks")


async def say(
    service: EdgeService, prompt: list[int], model: str | None = None, max_tokens: int = 1
) -> list[int]:
    stats = GenerationStats()
    async for _ in service.stream(model, prompt, SamplingParams(max_tokens=max_tokens), stats):
        pass
    return stats.token_ids


def num_open(model: FakeModel) -> int:
    return sum(not sequence.closed for sequence in model.sequences)


async def test_a_conversation_goes_on_where_it_was() -> None:
    model = FakeModel()
    service = fake_service(model)
    assert await say(service, [20, 21], max_tokens=2) == [22, 23]
    assert await say(service, [20, 21, 22, 23, 30]) == [31]
    assert len(model.sequences) == 1
    assert model.steps[-1] == ([23, 30], 3, "last")
    await service.aclose()
    await service.aclose()
    assert num_open(model) == 0


async def test_a_conversation_is_found_among_others_and_tried_again() -> None:
    model = FakeModel()
    service = fake_service(model)
    first, second = [20, 21, 22, 23], [20, 31, 32, 33]
    await say(service, first, max_tokens=8)
    await say(service, second)
    assert len(model.sequences) == 2, "one token in common is no conversation"
    model.taken_steps()
    await say(service, [*first, 24, 50])
    await say(service, [*second, 34, 60])
    await say(service, first)  # its answer is not wanted any more
    assert [position for _, position, _ in model.taken_steps()] == [5, 4, 3]
    assert len(model.sequences) == 2
    await service.aclose()


async def test_each_model_has_caches_of_its_own() -> None:
    one, other = FakeModel(), FakeModel(lambda ids: ids[-1] + 10)
    service = fake_service(one, other)
    assert service.models == ("0", "1")
    assert await say(service, [20, 21]) == [22]
    assert await say(service, [20, 21], "1") == [31]
    assert await say(service, [20, 21], "0") == [22]
    assert (len(one.sequences), len(other.sequences)) == (1, 1)
    with pytest.raises(UnknownModel, match="no model 'two' here; choose from 0, 1"):
        await say(service, [20], "two")
    await service.aclose()


async def test_the_oldest_conversation_makes_room() -> None:
    model = FakeModel()
    service = fake_service(model, max_conversations=2)
    for start in (20, 30, 40):
        await say(service, [start, start + 5, start + 9])
    assert [sequence.closed for sequence in model.sequences] == [True, False, False]
    assert (await service.status()).open_conversations == 2
    await service.aclose()


async def test_a_conversation_here_makes_room_on_a_full_cloud() -> None:
    model = FakeModel()
    service = fake_service(model)
    await say(service, [20, 25])
    model.max_sequences = 1
    assert await say(service, [40, 45]) == [46]
    assert [sequence.closed for sequence in model.sequences] == [True, False]
    model.max_sequences = 0
    with pytest.raises(CapacityError):
        await say(service, [50, 55])
    await service.aclose()


async def test_who_comes_when_all_are_busy_waits_and_more_are_refused() -> None:
    model = FakeModel()
    service = fake_service(model, max_conversations=1, max_waiting=1)
    answer = service.stream(None, [20, 21], SamplingParams(), GenerationStats())
    async with aclosing(answer):
        await anext(answer)
        waiting = asyncio.create_task(say(service, [30, 31]))
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="1 requests already and 1 wait"):
            await say(service, [40, 41])
        assert (await service.status()).busy_conversations == 1
    assert await waiting == [32]
    assert (await service.status()).busy_conversations == 0
    await service.aclose()


async def test_an_answer_that_is_not_wanted_any_more_frees_its_session() -> None:
    model = FakeModel()
    service = fake_service(model)
    pieces = service.stream(None, [20, 21], SamplingParams(), GenerationStats())
    async with aclosing(pieces):
        await anext(pieces)
    assert num_open(model) == 0
    task = asyncio.create_task(say(service, [20, 21], max_tokens=30))
    await settled(lambda: num_open(model) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert num_open(model) == 0
    assert await say(service, [20, 21]) == [22]
    await service.aclose()


async def test_a_refused_prompt_leaves_the_conversation_alone() -> None:
    model = FakeModel(max_positions=6)
    service = fake_service(model)
    await say(service, [20, 21])
    with pytest.raises(RequestError):
        await say(service, [20, 21] * 9)
    assert await say(service, [20, 21, 22]) == [23]
    assert len(model.sequences) == 1
    await service.aclose()


@pytest.mark.parametrize("error", [ConnectionClosed("gone"), PrivateLoRAError("the cloud failed")])
async def test_after_a_failure_it_starts_anew(error: PrivateLoRAError) -> None:
    model = FakeModel()
    service = fake_service(model)
    await say(service, [20, 21])
    model.failures = [error]
    with pytest.raises(type(error)):
        await say(service, [20, 21, 22])
    assert num_open(model) == 0
    assert await say(service, [20, 21, 22]) == [23]
    assert model.steps[-1] == ([20, 21, 22], 0, "last")
    await service.aclose()


@pytest.mark.parametrize(("num_kept", "rerun"), [(0, [20, 21, 22, 23]), (2, [22, 23])])
async def test_a_sequence_that_was_lost_while_nobody_used_it_goes_on(
    num_kept: int, rerun: list[int]
) -> None:
    model = FakeModel()
    service = fake_service(model)
    await say(service, [20, 21, 22])
    model.sequences[0].lost, model.num_kept = True, num_kept
    model.taken_steps()
    assert await say(service, [20, 21, 22, 23]) == [24]
    assert model.taken_steps() == [(rerun, num_kept, "last")]
    assert len(model.sequences) == 1
    await service.aclose()


async def test_scores_are_those_of_the_model() -> None:
    model = world().unsplit()
    service = fake_service(model)
    token_ids = [3, 17, 5, 9, 30, 2, 8] * 7
    scored = await service.score(None, token_ids, 3)
    sequence = await model.open_sequence(len(token_ids))
    logits = await sequence.forward(token_ids, 0, "all")
    logprobs = torch.log_softmax(logits, dim=-1)
    assert [each.token_id for each in scored] == token_ids[1:]
    for row, each in zip(logprobs, scored, strict=False):
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-5)
        values, ids = row.topk(3)
        assert [token_id for token_id, _ in each.top] == ids.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-5)
    await service.aclose()


async def test_logprobs_come_with_the_tokens_and_know_nothing_of_penalties() -> None:
    service = fake_service(world().unsplit())
    stats, plain = GenerationStats(), GenerationStats()
    params = SamplingParams(
        max_tokens=6, ignore_eos=True, logprobs=2, frequency_penalty=2.0, logit_bias={7: 5.0}
    )
    async for _ in service.stream(None, [3, 17, 5], params, stats):
        pass
    async for _ in service.stream(None, [3, 17, 5], SamplingParams(max_tokens=6), plain):
        pass
    assert plain.logprobs == []
    assert [each.token_id for each in stats.logprobs] == stats.token_ids
    scored = await service.score(None, [3, 17, 5, *stats.token_ids], 2)
    for got, expected in zip(stats.logprobs, scored[2:], strict=True):
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert len(got.top) == 2
    await service.aclose()


def test_parameters_are_the_edges_unless_told() -> None:
    service = fake_service(FakeModel(), max_tokens=7, temperature=0.5)
    params = service.params({"temperature": 0.0})
    assert (params.max_tokens, params.temperature) == (7, 0.0)
    with pytest.raises(RequestError, match="sampling: temperature"):
        service.params({"temperature": "hot"})


# A cloud that is lost


@pytest.mark.parametrize("num_kept", [0, 3, 1000])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionClosed("gone"),
        RemoteProtocolError("damaged"),
        LocalProtocolError("they say that this end sent nonsense"),
    ],
)
async def test_a_lost_link_is_a_pause(num_kept: int, error: PrivateLoRAError) -> None:
    model = FakeModel()
    model.num_kept = num_kept
    service = fake_service(model, patience_s=30.0)
    stats = GenerationStats()
    answer: list[str] = []
    async for piece in service.stream(None, [20, 21], SamplingParams(max_tokens=6), stats):
        if len(answer) == 2:
            model.failures = [error, error]
        answer.append(piece)
    assert stats.token_ids == [22, 23, 24, 25, 26, 27]
    assert [sequence.closed for sequence in model.sequences] == [False]
    assert stats.decode_traffic.round_trips > 0
    await service.aclose()


async def test_a_cloud_that_is_away_for_a_while_is_waited_for() -> None:
    model = FakeModel()
    service = fake_service(model, patience_s=30.0)
    stats = GenerationStats()
    pieces = service.stream(None, [20, 21], SamplingParams(max_tokens=4), stats)
    async with aclosing(pieces):
        await anext(pieces)
        model.failures = [ConnectionClosed("gone")]
        model.refusals = [ConnectError("nobody there"), CapacityError("full")]
        async for _ in pieces:
            pass
    assert stats.token_ids == [22, 23, 24, 25]
    assert model.refusals == []
    await service.aclose()


@pytest.mark.parametrize("error", [ConnectError("nobody there"), CloudDraining("it shuts down")])
async def test_who_asks_while_the_cloud_is_away_waits_too(error: PrivateLoRAError) -> None:
    model = FakeModel()
    service = fake_service(model, patience_s=30.0)
    model.away = [error] * 3
    assert await say(service, [20, 21]) == [22]
    assert model.away == []
    await service.aclose()


async def test_who_asks_when_others_have_waited_in_vain_is_told_at_once() -> None:
    model = FakeModel()
    service = fake_service(model, patience_s=0.2)
    await say(service, [20, 21])
    model.sequences[0].lost = True
    model.away = [ConnectError("nobody there")] * 1000
    model.refusals = [ConnectError("nobody there")] * 1000
    with pytest.raises(ConnectError):
        await say(service, [50, 51])
    assert len(model.away) < 999
    for prompt, tried in (([60, 61], model.away), ([20, 21, 22], model.refusals)):
        num_left = len(tried)
        with pytest.raises(ConnectError):
            await say(service, prompt)
        assert len(tried) == num_left - 1
    model.away = []  # it is back
    assert await say(service, [70, 71]) == [72]
    model.away = [ConnectError("nobody there")] * 2  # and waited for again
    assert await say(service, [10, 11]) == [12]
    await service.aclose()


async def test_patience_ends() -> None:
    model = FakeModel()
    service = fake_service(model, patience_s=0.2)
    stats = GenerationStats()
    pieces = service.stream(None, [20, 21], SamplingParams(max_tokens=4), stats)
    async with aclosing(pieces):
        await anext(pieces)
        model.failures = [ConnectionClosed("gone")]
        model.refusals = [ConnectError("nobody there")] * 1000
        with pytest.raises(ConnectError, match="nobody there"):
            async for _ in pieces:
                pass
    assert 0 < len(model.refusals) < 1000
    assert (await service.status()).open_conversations == 0
    await service.aclose()


async def test_nonsense_without_end_is_an_error() -> None:
    model = FakeModel()
    service = fake_service(model, patience_s=1000.0)
    model.failures = [RemoteProtocolError("nonsense")] * 100
    pieces = service.stream(None, [20, 21], SamplingParams(max_tokens=4), GenerationStats())
    with pytest.raises(RemoteProtocolError, match="nonsense"):
        async for _ in pieces:
            pass
    assert 90 < len(model.failures) < 100
    await service.aclose()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
async def test_memory_that_runs_out_here_is_an_error_and_passes(error: Exception) -> None:
    model = FakeModel()
    service = fake_service(model, patience_s=1000.0)
    model.failures = [error]
    pieces = service.stream(None, [20, 21], SamplingParams(max_tokens=4), GenerationStats())
    with pytest.raises(CapacityError, match="this device could not compute"):
        async for _ in pieces:
            pass
    assert num_open(model) == 0
    assert await say(service, [20, 21]) == [22]
    await service.aclose()


async def test_what_cannot_be_mended_is_said_at_once() -> None:
    model = FakeModel()
    service = fake_service(model, patience_s=1000.0)
    model.failures = [ConnectionClosed("gone")]
    model.refusals = [PartitionError("another model")]
    pieces = service.stream(None, [20, 21], SamplingParams(max_tokens=4), GenerationStats())
    with pytest.raises(PartitionError, match="another model"):
        async for _ in pieces:
            pass
    await service.aclose()
