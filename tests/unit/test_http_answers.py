"""Answers over HTTP: what OpenAI's API promises, over a model whose tokens are known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from privatelora.errors import (
    AuthError,
    CapacityError,
    ConnectError,
    ConnectionClosed,
    PrivateLoRAError,
    RemoteProtocolError,
    TransportTimeout,
)
from tests.partition.tiny import tiny_tokenizer
from tests.unit.fakes import FakeModel, FakeSequence, fake_service
from tests.unit.http_client import Client, read_reply, request_bytes, serving
from tests.unit.waiting import settled

pytestmark = pytest.mark.usefixtures("nothing_leaks")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = [20]
"""After it the model counts: '3', '4', ..."""
HELLO = [{"role": "user", "content": "Hello"}]


NEWLINE = tiny_tokenizer().encode("\n")[-1]
"""Ends the prompt of a chat."""


def count(token_ids: list[int]) -> int:
    """'2', '3', '4', ... in a chat; after another token the one that follows it."""
    return 19 if token_ids[-1] == NEWLINE else token_ids[-1] + 1


@pytest.fixture
def model() -> FakeModel:
    return FakeModel(count)


@pytest.fixture
async def client(model: FakeModel) -> AsyncIterator[Client]:
    async with serving(fake_service(model, FakeModel(count), max_tokens=4)) as started:
        yield started


async def complete(client: Client, **body: Any) -> Any:
    reply = await client.post(COMPLETIONS, {"prompt": PROMPT, **body})
    assert reply.status == 200, reply.body
    return reply.json


async def test_chat(client: Client) -> None:
    reply = await client.post(CHAT, {"messages": HELLO, "model": "1", "unknown": {"to": "us"}})
    assert reply.status == 200
    content = reply.json
    [choice] = content["choices"]
    assert (content["object"], content["model"]) == ("chat.completion", "1")
    assert content["id"].startswith("chatcmpl-")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "1234"
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    usage = content["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    assert content["privatelora"]["round_trips_per_token"] == 2


async def test_a_stream_is_the_whole_answer_in_parts(client: Client) -> None:
    body: dict[str, Any] = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    whole = (await client.post(CHAT, body)).json
    streamed = await client.post(CHAT, {**body, "stream": True})
    events = streamed.events
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["length"]
    entries = [
        entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]
    ]
    assert entries == whole["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 4
    assert all("usage" not in event for event in events)


async def test_usage_in_a_stream_when_asked_for(client: Client) -> None:
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    events = (await client.post(CHAT, body)).events
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 4
    assert events[-1]["privatelora"]["completion_tokens"] == 4

    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    events = (await client.post(CHAT, body)).events
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 1, 2, 3, 4, 4, 4]
    assert all("privatelora" in event for event in events)


async def test_plain_completions(client: Client) -> None:
    content = await complete(client)
    assert content["object"] == "text_completion"
    assert content["choices"] == [
        {"index": 0, "text": "3456", "logprobs": None, "finish_reason": "length"}
    ]
    streamed = await client.post(COMPLETIONS, {"prompt": PROMPT, "stream": True, "max_tokens": 2})
    choices = [event["choices"][0] for event in streamed.events]
    assert [choice["text"] for choice in choices] == ["3", "4", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("0", ["1"]),
        (["0", "4"], ["1", "5"]),
        ([18], ["1"]),
        ([[18], [18, 22]], ["1", "5"]),
    ],
)
async def test_all_kinds_of_prompts(client: Client, prompt: Any, texts: list[str]) -> None:
    content = await complete(client, prompt=prompt, max_tokens=1)
    assert [choice["text"] for choice in content["choices"]] == texts
    assert [choice["index"] for choice in content["choices"]] == list(range(len(texts)))


async def test_several_choices(client: Client) -> None:
    content = await complete(client, prompt=[[18], [22]], n=3, max_tokens=1)
    assert [choice["text"] for choice in content["choices"]] == ["1"] * 3 + ["5"] * 3
    assert content["usage"]["prompt_tokens"] == 2
    assert content["usage"]["completion_tokens"] == 6
    reply = await client.post(CHAT, {"messages": HELLO, "n": 6, "stream": True, "max_tokens": 2})
    for number in range(6):
        choices = [c for e in reply.events for c in e["choices"] if c["index"] == number]
        assert len(choices) == 4
        assert choices[-1]["finish_reason"] == "length"


async def test_choices_have_seeds_of_their_own() -> None:
    # All tokens are likely at this temperature.
    async with serving(fake_service(FakeModel(), max_tokens=8)) as client:
        chance: dict[str, Any] = {"temperature": 2.0, "logit_bias": {"30": 19.5, "31": 19.7}}
        content = await complete(client, n=4, seed=-5, **chance)
        texts = [choice["text"] for choice in content["choices"]]
        assert len(set(texts)) == 4
        again = await complete(client, n=2, seed=-5, **chance)
        assert [choice["text"] for choice in again["choices"]] == texts[:2]


async def test_stop_strings(client: Client) -> None:
    for stop in ("56", ["zz", "56"]):
        [choice] = (await complete(client, stop=stop, logprobs=0, max_tokens=9))["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("34", "stop")
        assert choice["logprobs"]["tokens"] == ["3", "4"]


async def test_the_end_of_sequence_is_no_part_of_the_answer() -> None:
    model = FakeModel(lambda ids: 2 if ids[-1] == 22 else ids[-1] + 1)
    async with serving(fake_service(model)) as client:
        [choice] = (await complete(client, logprobs=1))["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("34", "stop")
        assert choice["logprobs"]["tokens"] == ["3", "4"]
        content = await complete(client, ignore_eos=True, max_tokens=9)
        assert content["usage"]["completion_tokens"] == 9
        # Who scores a prompt takes the last token off, whatever it is.
        [scored] = (await complete(client, prompt=[20, 22], echo=True, logprobs=1, max_tokens=1))[
            "choices"
        ]
        assert scored["logprobs"]["tokens"] == ["2", "4", "<|end|>"]


async def test_a_prompt_is_scored(client: Client) -> None:
    wanted = {"prompt": "0124", "echo": True, "logprobs": 2}
    [scored] = (await complete(client, **wanted, max_tokens=0))["choices"]
    assert scored["text"] == "0124"
    logprobs = scored["logprobs"]
    assert logprobs["tokens"] == ["0", "1", "2", "4"]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    first, *likely, unlikely = logprobs["token_logprobs"]
    assert first is None
    assert all(-0.1 < logprob < 0 for logprob in likely)
    assert unlikely < -19
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][3]["3"] > -0.1
    assert logprobs["top_logprobs"][3]["4"] == unlikely
    [continued] = (await complete(client, **wanted, max_tokens=2))["choices"]
    assert continued["text"] == "012456"
    assert continued["logprobs"]["tokens"] == ["0", "1", "2", "4", "5", "6"]
    reply = await client.post(COMPLETIONS, {**wanted, "max_tokens": 2, "stream": True})
    parts = [event["choices"][0] for event in reply.events]
    assert "".join(part["text"] for part in parts) == "012456"
    for name in ("tokens", "text_offset"):
        column = [value for part in parts for value in part["logprobs"][name]]
        assert column == continued["logprobs"][name]


@pytest.mark.parametrize("stream", [False, True])
async def test_scores_that_are_no_numbers_are_no_answer(
    client: Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """A cloud may send anything; NaN is no JSON."""
    forward = FakeSequence.forward

    async def spoilt(*arguments: Any) -> torch.Tensor:
        return await forward(*arguments) * torch.nan

    monkeypatch.setattr(FakeSequence, "forward", spoilt)
    wanted = {"prompt": "0124", "echo": True, "logprobs": 2, "max_tokens": 0, "stream": stream}
    reply = await client.post(COMPLETIONS, wanted)
    assert (reply.status, reply.error["code"]) == (502, "cloud_error")


async def test_the_edges_instructions_come_first(model: FakeModel) -> None:
    tokenizer = tiny_tokenizer()
    turn = {"role": "user", "content": "a"}

    async def prompt(messages: list[Any]) -> str:
        model.steps.clear()
        async with serving(fake_service(model, system_prompt="B", max_tokens=1)) as client:
            assert (await client.post(CHAT, {"messages": messages})).status == 200
        return str(tokenizer.decode([token for step in model.steps for token in step[0]]))

    assert "system\nB" in await prompt([turn])
    own = await prompt([{"role": "developer", "content": "C"}, turn])
    assert "system\nC" in own
    assert "B" not in own
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    assert "user\nxy" in await prompt([{"role": "user", "content": parts}])


async def test_json(client: Client) -> None:
    schema = {"type": "array", "items": {"const": 5}, "minItems": 2, "maxItems": 2}
    answer = {"type": "json_schema", "json_schema": {"name": "five", "schema": schema}}
    body = {"messages": HELLO, "response_format": answer, "max_tokens": 60, "ignore_eos": True}
    for stream in (False, True):
        reply = await client.post(CHAT, {**body, "stream": stream})
        if stream:
            choices = [event["choices"][0] for event in reply.events]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            finish_reason = choices[-1]["finish_reason"]
        else:
            [choice] = reply.json["choices"]
            text, finish_reason = choice["message"]["content"], choice["finish_reason"]
        assert "".join(text.split()) == "[5,5]"
        assert finish_reason == "stop"
    content = await complete(client, response_format={"type": "json_object"}, max_tokens=1)
    assert content["choices"][0]["text"] == "{"
    assert (await complete(client, response_format={"type": "text"}))["choices"][0][
        "text"
    ] == "3456"
    schema["type"] = "banana"
    error = (await client.post(CHAT, body)).error
    assert error["param"] == "response_format"
    assert "banana" in error["message"]


FAILURES: dict[str, tuple[PrivateLoRAError, int, str]] = {
    "full": (CapacityError("full", retry_after_s=2.5), 429, "rate_limit_exceeded"),
    "away": (ConnectError("away"), 503, "cloud_unreachable"),
    "lost": (ConnectionClosed("lost"), 503, "cloud_unreachable"),
    "slow": (TransportTimeout("slow"), 504, "cloud_timeout"),
    "strange": (RemoteProtocolError("strange"), 502, "cloud_error"),
    "refused": (AuthError("refused"), 502, "cloud_error"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_of_the_cloud(
    client: Client, model: FakeModel, name: str, stream: bool
) -> None:
    failure, status, code = FAILURES[name]
    model.failures.append(failure)
    reply = await client.post(CHAT, {"messages": HELLO, "stream": stream})
    assert (reply.status, reply.error["code"]) == (status, code)
    assert reply.error["message"] == name
    if status == 429:
        assert reply.headers["retry-after"] == "3"
    assert (await client.post(CHAT, {"messages": HELLO})).status == 200


async def test_a_failure_in_the_middle_of_a_stream_ends_it() -> None:
    model = FakeModel(lambda ids: ids[-1] + 1 if ids[-1] < 22 else _raise())
    async with serving(fake_service(model)) as client:
        reply = await client.post(COMPLETIONS, {"prompt": PROMPT, "stream": True})
        assert reply.status == 200
        *chunks, last = reply.events
        assert "".join(event["choices"][0]["text"] for event in chunks) == "34"
        assert last["error"]["code"] == "cloud_unreachable"


def _raise() -> int:
    raise ConnectionClosed("the link is gone")


async def test_a_defect_shows_nothing_of_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def defect(_: list[int]) -> int:
        raise KeyError("what the user wrote")

    async with serving(fake_service(FakeModel(defect))) as client:
        for stream in (False, True):
            reply = await client.post(CHAT, {"messages": HELLO, "stream": stream})
            assert reply.status == 500
            assert reply.error["message"] == "internal error; see this edge's log"
            assert "KeyError" in caplog.text
            assert "user wrote" not in caplog.text.replace('raise KeyError("what the user', "")
            caplog.clear()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 6])
async def test_a_client_that_leaves_frees_the_session(stream: bool, n: int) -> None:
    model = FakeModel(lambda ids: 20, max_positions=10**6)
    service = fake_service(model, max_tokens=10**6)
    service._cloud.max_positions = 10**6  # type: ignore[misc]
    async with serving(service) as client:
        body = b'{"prompt": [20], "n": %d, "stream": %s}' % (n, b"true" if stream else b"false")
        async with client.connection() as (reader, writer):
            host = f"{client.host}:{client.port}"
            writer.write(request_bytes("POST", COMPLETIONS, body, {}, host))
            if stream:
                await reader.readuntil(b"data: ")
            else:
                await settled(lambda: len(model.steps) > 50)
        await settled(lambda: all(sequence.closed for sequence in model.sequences))
        assert len(model.sequences) >= min(n, 4)
        metrics = (await client.get("/metrics")).body.decode()
        assert "privatelora_edge_active_answers 0.0" in metrics


async def test_many_at_once(client: Client) -> None:
    asked = [complete(client, prompt=[18 + number], max_tokens=1) for number in range(8)]
    replies = await asyncio.gather(*asked)
    texts = [reply["choices"][0]["text"] for reply in replies]
    assert texts == [chr(ord("1") + number) if number < 9 else "?" for number in range(8)]


async def test_more_than_can_wait_are_told_to_come_back() -> None:
    model = FakeModel(lambda ids: 20, max_positions=10**6)
    service = fake_service(model, max_conversations=1, max_waiting=1, max_tokens=10**6)
    service._cloud.max_positions = 10**6  # type: ignore[misc]
    async with serving(service) as client, client.connection() as (_, busy):
        body, host = b'{"prompt": [20]}', f"{client.host}:{client.port}"
        busy.write(request_bytes("POST", COMPLETIONS, body, {}, host))
        await settled(lambda: len(model.steps) > 5)
        async with client.connection() as (_, waiting):
            waiting.write(request_bytes("POST", COMPLETIONS, body, {}, host))
            await settled(lambda: service._contexts._num_waiting == 1)
            refused = await client.post(COMPLETIONS, {"prompt": PROMPT})
            assert refused.status == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.error["code"] == "rate_limit_exceeded"


async def test_pipelined_requests_are_answered_in_turn(client: Client) -> None:
    host = f"{client.host}:{client.port}"
    requests = [
        request_bytes("POST", COMPLETIONS, b'{"prompt": [%d], "max_tokens": 1}' % token, {}, host)
        for token in (18, 20, 22)
    ]
    async with client.connection() as (reader, writer):
        writer.write(b"".join(requests))
        replies = [await read_reply(reader) for _ in requests]
    assert [reply.json["choices"][0]["text"] for reply in replies] == ["1", "3", "5"]


async def test_models(client: Client) -> None:
    listed = (await client.get("/v1/models")).json
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["0", "1"]
    assert (await client.get("/v1/models/1")).json == listed["data"][1]
    missing = await client.get("/v1/models/gpt-4o")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a"})):
        missing = await client.post(path, {**body, "model": "gpt-4o"})
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")
        assert missing.error["param"] == "model"


async def test_what_the_edge_says_of_itself(client: Client) -> None:
    await complete(client)
    status = (await client.get("/v1/privatelora/status")).json
    assert (status["connected"], status["models"]) == (True, ["0", "1"])
    assert status["version"]
    sent = (await client.get("/v1/privatelora/sent?after=5")).json
    assert sent == {"totals": {}, "recent": []}
    for wrong in ("x", "1e5", "9" * 99, ""):
        reply = await client.get(f"/v1/privatelora/sent?after={wrong}")
        assert (reply.status, reply.error["param"]) == (400, "after")
    assert (await client.get("/health/live")).status == 200
    assert (await client.get("/health/ready")).json == {"status": "ready"}
    metrics = (await client.get("/metrics")).body.decode()
    assert 'privatelora_edge_requests_total{route="/v1/completions",status="200"} 1.0' in metrics
    assert "privatelora_edge_completion_tokens_total 4.0" in metrics
    assert "privatelora_edge_sent_bytes_total 400.0" in metrics


async def test_the_page_loads_nothing_from_elsewhere(client: Client) -> None:
    index = await client.get("/")
    assert index.status == 200
    assert index.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in index.headers["content-security-policy"]
    assert (await client.get("/page/index.html")).body == index.body
    for name in ("..%2f..%2fserver.py", "%2e%2e", "nothing.js", ".", "%00"):
        reply = await client.get(f"/page/{name}")
        assert reply.status == 404
        assert reply.error
