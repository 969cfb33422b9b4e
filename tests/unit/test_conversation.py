"""Conversations in words: their cache over several turns, failures, and chat templates."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import pytest

from privatelora.errors import ConnectionClosed, PrivateLoRAError, RequestError
from privatelora.runtime.chat import Conversation, TextModel
from privatelora.runtime.generation import GenerationStats
from privatelora.runtime.sampling_params import SamplingParams
from tests.partition.tiny import tiny_tokenizer
from tests.unit.fakes import FakeModel

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def fake_conversation(**options: Any) -> tuple[FakeModel, Conversation]:
    model = FakeModel(**options)
    return model, Conversation(TextModel(model, tiny_tokenizer()))


async def say(conversation: Conversation, prompt: list[int], **params: Any) -> list[int]:
    stats = GenerationStats()
    async for _ in conversation.stream(prompt, SamplingParams(**params), stats):
        pass
    return stats.token_ids


async def test_a_conversation_keeps_its_sequence() -> None:
    model, conversation = fake_conversation()
    assert await say(conversation, [20, 21], max_tokens=2) == [22, 23]
    assert await say(conversation, [20, 21, 22, 23, 30], max_tokens=1) == [31]
    assert len(model.sequences) == 1
    assert model.steps[-1] == ([23, 30], 3, "last")
    await conversation.aclose()
    await conversation.aclose()
    assert model.sequences[0].closed


async def test_a_conversation_survives_a_refused_prompt() -> None:
    model, conversation = fake_conversation(max_positions=6)
    await say(conversation, [20, 21], max_tokens=1)
    with pytest.raises(RequestError):
        await say(conversation, [20] * 9)
    assert await say(conversation, [20, 21, 22], max_tokens=1) == [23]
    assert len(model.sequences) == 1
    await conversation.aclose()


@pytest.mark.parametrize("error", [ConnectionClosed("gone"), PrivateLoRAError("the cloud failed")])
async def test_a_conversation_starts_anew_after_a_failure(error: PrivateLoRAError) -> None:
    model, conversation = fake_conversation()
    await say(conversation, [20, 21], max_tokens=1)
    model.failures = [error]
    with pytest.raises(type(error)):
        await say(conversation, [20, 21, 22])
    assert model.sequences[0].closed
    assert await say(conversation, [20, 21, 22], max_tokens=1) == [23]
    assert len(model.sequences) == 2
    assert model.steps[-1] == ([20, 21, 22], 0, "last")
    await conversation.aclose()


async def test_an_answer_that_is_not_wanted_any_more() -> None:
    model, conversation = fake_conversation()
    pieces = conversation.stream([20, 21], SamplingParams(), GenerationStats())
    async with aclosing(pieces):
        await anext(pieces)
    assert await say(conversation, [20, 21, 40], max_tokens=1) == [41]
    assert len(model.sequences) == 1
    await conversation.aclose()


def test_the_chat_template_writes_the_special_tokens() -> None:
    text = TextModel(FakeModel(), tiny_tokenizer())
    prompt = text.encode_chat([{"role": "user", "content": "how many"}])
    decoded = tiny_tokenizer().decode(prompt)
    assert decoded == "<|start|>user\nhow many<|end|>\n<|start|>assistant\n"
    assert prompt[0] == tiny_tokenizer().bos_token_id


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{% for x in %}",
    ],
)
def test_a_chat_template_that_refuses(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text = TextModel(FakeModel(), tokenizer)
    with pytest.raises(RequestError, match="chat template"):
        text.encode_chat([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}])


def test_no_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        TextModel(FakeModel(), tokenizer).encode_chat([{"role": "user", "content": "Hi"}])
