"""An edge's HTTP server over a model that needs no cloud, and a client of bare sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from privatelora.runtime.edge_service import EdgeService
from privatelora.runtime.http.server import HttpServer
from privatelora.runtime.http_config import HttpConfig

PATIENCE_S = 20
NO_HEADERS: Mapping[str, str] = {}


@dataclass
class Reply:
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape, and nothing else."""
        assert self.headers["content-type"] == "application/json"
        assert list(self.json) == ["error"]
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert "\n" not in error["message"]
        assert isinstance(error["type"], str)
        return error

    @property
    def events(self) -> list[Any]:
        """The events of a stream; the last one must have said that it is the last."""
        assert self.headers["content-type"].startswith("text/event-stream")
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        data = [block.removeprefix("data: ") for block in blocks]
        if data[-1] == "[DONE]":
            data.pop()
        else:
            assert "error" in json.loads(data[-1])
        return [json.loads(line) for line in data]


class Client:
    """Asks one server; every request on a connection of its own."""

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        host, port = server.url.removeprefix("http://").rsplit(":", 1)
        self.host, self.port = host, int(port)

    async def get(self, path: str, headers: Mapping[str, str] = NO_HEADERS) -> Reply:
        return await self.request("GET", path, b"", headers)

    async def post(self, path: str, body: object, headers: Mapping[str, str] = NO_HEADERS) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.request("POST", path, data, headers)

    async def request(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> Reply:
        return await self.raw(
            request_bytes(method, path, body, headers, f"{self.host}:{self.port}")
        )

    async def raw(self, data: bytes) -> Reply:
        """Send bytes and read one response."""
        async with self.connection() as (reader, writer):
            writer.write(data)
            return await read_reply(reader)

    @asynccontextmanager
    async def connection(
        self,
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def request_bytes(
    method: str, path: str, body: bytes, headers: Mapping[str, str], host: str
) -> bytes:
    """A request of HTTP/1.1; ``headers`` replace the usual ones."""
    every = {"Host": host, "Content-Length": str(len(body)), **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in every.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """Read one response, whatever form its body has."""
    async with asyncio.timeout(PATIENCE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in head[1:-2]:
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        status = int(head[0].split()[1])
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readuntil(b"\r\n")
        else:
            body = await reader.readexactly(int(headers["content-length"]))
    return Reply(status, headers, body)


@asynccontextmanager
async def serving(service: EdgeService, **settings: Any) -> AsyncIterator[Client]:
    """The service over HTTP on a port of the system's choice."""
    server = HttpServer(service, HttpConfig(listen="127.0.0.1:0", **settings))
    try:
        async with server.listening():
            yield Client(server)
    finally:
        await service.aclose()
