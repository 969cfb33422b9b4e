"""Every bad request gets one clear error in OpenAI's shape, and the next one is answered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.fakes import FakeModel, fake_service
from tests.unit.http_bad_requests import (
    CHAT,
    CHAT_BODIES,
    COMPLETION_BODIES,
    COMPLETIONS,
    NOT_JSON,
    RAW,
)
from tests.unit.http_client import Client, serving

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving(fake_service(FakeModel(lambda ids: 20)), max_body_mib=1) as started:
        yield started
        good = await started.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1})
        assert good.status == 200


async def refused(client: Client, path: str, case: tuple[Any, str | None, str]) -> None:
    body, param, message = case
    for stream in (False, True):
        if stream and isinstance(body, dict):
            body = {"stream": True, **body}
        if stream and param == "stream_options":  # good in a stream
            continue
        reply = await client.post(path, body)
        assert reply.status == 400
        error = reply.error
        assert (error["type"], error["param"]) == ("invalid_request_error", param), error
        assert message in error["message"]


@pytest.mark.parametrize("name", CHAT_BODIES)
async def test_bad_chat(client: Client, name: str) -> None:
    await refused(client, CHAT, CHAT_BODIES[name])


@pytest.mark.parametrize("name", COMPLETION_BODIES)
async def test_bad_completion(client: Client, name: str) -> None:
    await refused(client, COMPLETIONS, COMPLETION_BODIES[name])


async def test_a_prompt_that_is_too_long_says_so_to_programs(client: Client) -> None:
    for stream in (False, True):
        reply = await client.post(COMPLETIONS, {"prompt": [5] * 64, "stream": stream})
        assert reply.error["code"] == "context_length_exceeded"
    scored = {"prompt": [5] * 64, "echo": True, "logprobs": 1, "max_tokens": 0}
    assert (await client.post(COMPLETIONS, scored)).status == 200


@pytest.mark.parametrize("name", NOT_JSON)
async def test_not_json(client: Client, name: str) -> None:
    body, message = NOT_JSON[name]
    reply = await client.post(COMPLETIONS, body)
    assert reply.status == 400
    assert message in reply.error["message"]


@pytest.mark.parametrize("name", RAW)
async def test_bad_bytes(client: Client, name: str) -> None:
    data, status = RAW[name]
    reply = await client.raw(data)
    assert reply.status == status
    assert reply.error["type"] == "invalid_request_error"


async def test_a_body_that_is_too_large(client: Client) -> None:
    reply = await client.post(COMPLETIONS, {"prompt": "a" * 2**20})
    assert reply.status == 413
    assert "http.max_body_mib" in reply.error["message"]
    chunks = b"40000\r\n" + b"a" * 2**18 + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert (await client.raw(head + chunks * 5)).status == 413


async def test_expecting_to_be_told_to_go_on(client: Client) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        b"Content-Length: 5\r\n\r\n"
    )
    async with client.connection() as (reader, writer):
        writer.write(head)
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
