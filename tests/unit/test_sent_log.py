"""What is shown of what was sent."""

from __future__ import annotations

import torch

from privatelora.runtime.sent_log import MAX_NOTED, MAX_WITH_NUMBERS, NUM_SHOWN, SentLog
from privatelora.runtime.tensors import pack
from privatelora.runtime.wire.messages import CloseSession, ExchangeReply, OutputRows, StepBegin
from tests.unit.world import serving, world


def test_messages_and_their_first_numbers() -> None:
    log = SentLog()
    hidden_states = torch.arange(24.0).reshape(2, 12)
    y = torch.full((1, 3), 0.5)
    log.note(StepBegin(4, 0, 0, OutputRows.LAST, pack(hidden_states, "fp16"), None), 100)
    log.note(ExchangeReply(4, 0, 1, pack(y, "int8")), 30)
    log.note(ExchangeReply(4, 1, 1, pack(y, "int8")), 32)
    log.note(CloseSession(4), 8)
    assert log.totals == {"StepBegin": (1, 100), "ExchangeReply": (2, 62), "CloseSession": (1, 8)}
    begin, reply, _, close = log.recent()
    assert (begin.kind, begin.rows, begin.features, begin.codec) == ("StepBegin", 2, 12, "fp16")
    assert begin.numbers == tuple(map(float, range(NUM_SHOWN)))
    assert (reply.session_id, reply.rows, reply.features, reply.nbytes) == (4, 1, 3, 30)
    assert (close.codec, close.numbers, close.rows) == (None, (), 0)
    assert [message.number for message in log.recent(after=1)] == [2, 3]


def test_only_the_last_are_kept() -> None:
    log = SentLog()
    for number in range(MAX_NOTED + 10):
        log.note(ExchangeReply(0, number, 1, pack(torch.ones(1, 4), "fp32")), 16)
    recent = log.recent()
    assert [message.number for message in recent] == list(range(10, MAX_NOTED + 10))
    assert sum(bool(message.numbers) for message in recent) == MAX_WITH_NUMBERS
    assert recent[-1].numbers == (1.0, 1.0, 1.0, 1.0)
    assert log.totals == {"ExchangeReply": (MAX_NOTED + 10, 16 * (MAX_NOTED + 10))}


async def test_a_link_notes_what_it_sends_and_measures_round_trips() -> None:
    split = world()
    async with serving(split.service().handle) as address:
        model = split.split(address)
        sequence = await model.open_sequence(16)
        await sequence.forward([1, 2, 3], 0, "last")
        link = await model.link()
        assert 0 < await link.ping() < 10
        assert 0 < await link.ping() < 10
        await sequence.aclose()
        sent = model.access.sent
        num_points = len(split.plan.wire_points)
        counts = {kind: messages for kind, (messages, _) in sent.totals.items()}
        assert counts == {
            "OpenSession": 1,
            "StepBegin": 1,
            "ExchangeReply": num_points,
            "Ping": 2,
            "CloseSession": 1,
        }
        nbytes = sum(nbytes for kind, (_, nbytes) in sent.totals.items() if "Ping" not in kind)
        close = sent.totals["CloseSession"][1]
        assert nbytes - close == sequence.traffic.sent_nbytes
        await model.aclose()
