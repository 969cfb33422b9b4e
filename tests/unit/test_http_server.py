"""Who may ask, how long it may take, and how the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from privatelora.errors import ConfigError, ConnectError
from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.http.server import HttpServer
from privatelora.runtime.http_config import HttpConfig
from tests.unit.fakes import FakeModel, fake_service
from tests.unit.http_client import Client, read_reply, request_bytes, serving
from tests.unit.waiting import settled

pytestmark = pytest.mark.usefixtures("nothing_leaks")

COMPLETIONS = "/v1/completions"
ASK = {"prompt": [20], "max_tokens": 1}
KEY = "Schlüssel-1"


def service(**options: Any) -> EdgeService:
    return fake_service(FakeModel(lambda ids: 20), **options)


def endless() -> tuple[EdgeService, FakeModel]:
    """A service whose answers take as long as somebody listens."""
    model = FakeModel(lambda ids: 20, max_positions=10**6)
    made = fake_service(model, max_tokens=10**6)
    made._cloud.max_positions = 10**6  # type: ignore[misc]
    return made, model


def headers_of(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {key}".encode().decode("latin-1")}


@pytest.fixture
def key_file(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    return {"file": str(file)}


async def test_a_key_guards_the_api(key_file: dict[str, str]) -> None:
    async with serving(service(), api_key=key_file) as client:
        wrong: list[Mapping[str, str]] = [
            {},
            headers_of("Schlüssel-2"),
            headers_of(""),
            headers_of(KEY, scheme="Basic"),
            {"Authorization": KEY.encode().decode("latin-1")},
        ]
        for path in ("/v1/models", "/metrics", "/v1/privatelora/sent", "/nothing"):
            for headers in wrong:
                reply = await client.get(path, headers)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
                assert KEY not in reply.error["message"]
        for path in ("/", "/health/live", "/health/ready", "/page/index.html"):
            assert (await client.get(path)).status == 200
        for scheme in ("Bearer", "bearer"):
            assert (await client.get("/v1/models", headers_of(KEY, scheme))).status == 200
        # Whoever has the key may come by any name and from any page.
        headers = {**headers_of(KEY), "Host": "edge.example", "Origin": "https://app.example"}
        assert (await client.post(COMPLETIONS, ASK, headers)).status == 200


async def test_another_key_takes_the_place_of_the_first(
    key_file: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(service(), api_key=key_file) as client:

        async def status(key: str) -> int:
            return (await client.get("/v1/models", headers_of(key))).status

        assert [await status(KEY), await status("another")] == [200, 401]
        Path(key_file["file"]).write_text("another\n")  # noqa: ASYNC240
        assert [await status(KEY), await status("another")] == [401, 200]
        Path(key_file["file"]).unlink()  # noqa: ASYNC240
        assert [await status(KEY), await status("another")] == [401, 200]
        assert caplog.text.count("the one before holds") == 1


HOSTS = {
    "localhost": 200,
    "LOCALHOST:8080": 200,
    "127.0.0.1": 200,
    "127.0.0.53:1": 200,
    "[::1]:80": 200,
    "evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "localhost.evil.example:80": 403,
    "localhost@evil.example": 403,
    "192.168.0.1": 403,
    "": 403,
    "[": 403,
}


@pytest.mark.parametrize("host", HOSTS)
async def test_only_names_of_this_machine(host: str) -> None:
    """Else a page could give its own name this machine's address, and read everything."""
    async with serving(service()) as client:
        reply = await client.get("/v1/models", {"Host": host})
        assert reply.status == HOSTS[host]
        if reply.status == 403:
            assert reply.error["code"] == "host_not_allowed"


async def test_pages_of_others_may_not_ask() -> None:
    async with serving(service()) as client:
        own = f"http://127.0.0.1:{client.port}"
        assert (await client.post(COMPLETIONS, ASK, {"Origin": own})).status == 200
        for origin in ("http://evil.example", "null", "", own + "1", own.replace("http", "https")):
            reply = await client.post(COMPLETIONS, ASK, {"Origin": origin})
            assert (reply.status, reply.error["code"]) == (403, "origin_not_allowed")
        preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        reply = await client.request("OPTIONS", COMPLETIONS, b"", preflight)
        assert reply.status == 405
        assert not [name for name in reply.headers if name.startswith("access-control")]


async def test_pages_that_are_allowed_may(key_file: dict[str, str]) -> None:
    async with serving(service(), cors_origins=["http://App.example:3000"]) as client:
        origin = {"Origin": "http://app.example:3000"}
        asking = {"Access-Control-Request-Method": "POST"}
        asking["Access-Control-Request-Headers"] = "authorization,x-stainless-lang"
        reply = await client.request("OPTIONS", COMPLETIONS, b"", {**origin, **asking})
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == origin["Origin"]
        assert "x-stainless-lang" in reply.headers["access-control-allow-headers"]
        reply = await client.post(COMPLETIONS, ASK, origin)
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == origin["Origin"]
        reply = await client.post(COMPLETIONS, ASK, {"Origin": "http://other.example:3000"})
        assert reply.status == 403
        assert "access-control-allow-origin" not in reply.headers
    async with serving(service(), cors_origins=["*"], api_key=key_file) as client:
        # The preflight of a browser carries no key.
        reply = await client.request("OPTIONS", COMPLETIONS, b"", {**origin, **asking})
        assert reply.status == 200


BAD_SETTINGS = [
    ({"listen": "0.0.0.0:80"}, "set api_key"),
    ({"listen": "[::]:80"}, "set api_key"),
    ({"listen": "edge.example:80"}, "set api_key"),
    ({"listen": "80"}, "expected host:port"),
    ({"cors_origins": ["*"]}, "set api_key"),
    ({"cors_origins": ["http://a.example/"]}, "an origin is scheme://host"),
    ({"api_key": {}}, "give either file"),
    ({"request_timeout_s": 0}, "greater than 0"),
]


@pytest.mark.parametrize(("settings", "said"), BAD_SETTINGS)
def test_settings_that_must_not_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        HttpConfig.model_validate(settings)


async def test_a_key_that_cannot_be_read_and_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable NO_SUCH_KEY"):
        HttpServer(service(), HttpConfig.model_validate({"api_key": {"env": "NO_SUCH_KEY"}}))
    async with serving(service()) as client:
        taken = HttpServer(service(), HttpConfig(listen=f"127.0.0.1:{client.port}"))
        with pytest.raises(ConnectError, match=r"set http\.listen to another address"):
            async with taken.listening():
                pass


SLOW = {
    "header": b"POST /v1/completions HTTP/1.1\r\nHost: loc",
    "body": b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"pro',
}


@pytest.mark.parametrize("part", SLOW)
async def test_a_request_that_does_not_arrive_is_cut(part: str) -> None:
    async with (
        serving(service(), request_timeout_s=0.1) as client,
        client.connection() as (reader, writer),
    ):
        writer.write(SLOW[part])
        reply = await read_reply(reader)
        assert (reply.status, reply.error["code"]) == (408, "request_timeout")
        assert await reader.read() == b""


async def test_trickling_does_not_help() -> None:
    async with (
        serving(service(), request_timeout_s=0.2) as client,
        client.connection() as (reader, writer),
    ):
        answer = asyncio.create_task(read_reply(reader))
        writer.write(SLOW["header"])
        while not answer.done():
            writer.write(b"a")
            await asyncio.wait({answer}, timeout=0.01)
        assert answer.result().status == 408


async def test_a_connection_without_a_request_is_closed() -> None:
    async with (
        serving(service(), request_timeout_s=0.05) as client,
        client.connection() as (reader, _),
    ):
        assert await reader.read() == b""


async def test_a_body_after_its_error_is_not_read_for_ever() -> None:
    async with (
        serving(service(), request_timeout_s=0.2) as client,
        client.connection() as (reader, writer),
    ):
        writer.write(SLOW["body"].replace(b"99", b"99999999"))
        assert (await read_reply(reader)).status == 413
        closed = asyncio.create_task(reader.read())
        while not closed.done():
            writer.write(b"a" * 100)
            await asyncio.wait({closed}, timeout=0.01)
        assert isinstance(closed.exception(), ConnectionError) or closed.result() == b""


async def test_a_client_that_does_not_read_is_cut() -> None:
    made, model = endless()
    async with (
        serving(made, request_timeout_s=0.2) as client,
        client.connection() as (reader, writer),
    ):
        body = b'{"prompt": [20], "stream": true, "logprobs": 20}'
        writer.write(request_bytes("POST", COMPLETIONS, body, {}, f"127.0.0.1:{client.port}"))
        await reader.readuntil(b"data: ")
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's has it
        await settled(lambda: all(sequence.closed for sequence in model.sequences))


async def test_more_requests_than_are_allowed() -> None:
    made, model = endless()
    async with serving(made, max_concurrent=1) as client, client.connection() as (_, writer):
        body = b'{"prompt": [20]}'
        writer.write(request_bytes("POST", COMPLETIONS, body, {}, f"127.0.0.1:{client.port}"))
        await settled(lambda: len(model.steps) > 0)
        refused = await client.post(COMPLETIONS, ASK)
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert refused.error["code"] == "rate_limit_exceeded"
        assert (await client.get("/health/ready")).status == 200


async def test_more_connections_than_are_allowed() -> None:
    async with serving(service(), max_concurrent=1) as client:
        idle = [await asyncio.open_connection("127.0.0.1", client.port) for _ in range(65)]
        refused = await client.get("/v1/models")
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(10):
            while (await client.get("/v1/models")).status != 200:
                pass


async def begun(client: Client, model: FakeModel) -> tuple[asyncio.Task[Any], list[bool]]:
    """An answer under way, and a list that ends it when something is put into it."""
    end: list[bool] = []
    model.continuation = lambda ids: 2 if end else 20
    answer = asyncio.create_task(client.post(COMPLETIONS, {"prompt": [20], "stream": True}))
    await settled(lambda: len(model.steps) > 5)
    return answer, end


async def test_draining_finishes_what_was_begun() -> None:
    made, model = endless()
    async with serving(made) as client, client.connection() as (reader, writer):
        health = request_bytes("GET", "/health/live", b"", {}, "localhost")
        writer.write(health)
        assert (await read_reply(reader)).status == 200
        answer, end = await begun(client, model)
        drain = asyncio.create_task(client.server.drain())
        assert await reader.read() == b""  # nobody was waiting for it
        ready = await client.get("/health/ready")
        assert (ready.status, ready.json["reason"]) == (503, "this edge is about to end")
        assert (await client.get("/health/live")).status == 200
        refused = await client.post(COMPLETIONS, ASK)
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert refused.headers["connection"].lower() == "close"
        assert not drain.done()
        end.append(True)
        await drain
        assert (await answer).events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_draining_takes_no_longer_than_it_may() -> None:
    made, model = endless()
    async with serving(made, drain_timeout_s=0.05) as client:
        answer, _ = await begun(client, model)
        await client.server.drain()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await answer
    assert all(sequence.closed for sequence in model.sequences)
