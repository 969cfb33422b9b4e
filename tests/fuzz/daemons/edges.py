"""An edge's HTTP port, and that of a cloud's metrics."""

from __future__ import annotations

import itertools
import json
from functools import partial
from random import Random
from typing import Any

from tests.e2e.deployment import Deployment
from tests.e2e.processes import EDGE, Process
from tests.fuzz.daemons.http_bytes import HttpBytes, request
from tests.fuzz.daemons.http_client import fetch, good_answer
from tests.fuzz.daemons.http_json import CHAT, COMPLETION, STREAMED, HttpJson
from tests.fuzz.daemons.inputs import Input, Target, Violation
from tests.fuzz.daemons.pipes import Pipe
from tests.fuzz.daemons.world import GoodClient, end, require_same, start_cloud, started
from tests.transports.cases import free_tcp_port

_numbers = itertools.count()


async def start_edge(
    deployment: Deployment, address: str, name: str, **settings: Any
) -> tuple[Process, int]:
    """An edge of a cloud and its port for HTTP."""
    http = {"listen": "127.0.0.1:0", "request_timeout_s": 2.0}
    config = deployment.edge_yaml(address, f"{name}.yaml", http=http, **settings)
    edge, url = await started(EDGE, config)
    return edge, int(url.rpartition(":")[2])


class EdgeHttpTarget(Target):
    """Half of the inputs are good HTTP."""

    name = "edge-http"

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._running: list[Process] = []

    async def start(self) -> None:
        name = f"{self.name}-{next(_numbers)}"
        cloud, address = await start_cloud(self._deployment, name)
        self._running.append(cloud)
        self.watched, self._port = await start_edge(
            self._deployment, address, f"{name}-edge", sampling={"max_tokens": 8}
        )
        self._running.append(self.watched)
        self.others = (cloud,)
        self._expected = await good_answer(self._port)
        requests = [
            *(request("GET", path) for path in ("/", "/metrics", "/v1/models", "/health/ready")),
            request("POST", "/v1/chat/completions", json.dumps(CHAT).encode()),
            request("POST", "/v1/completions", json.dumps(COMPLETION).encode()),
            request("POST", "/v1/completions", json.dumps(COMPLETION | STREAMED).encode()),
        ]
        self._bytes = HttpBytes(partial(Pipe.over_tcp, self._port), requests)
        self._json = HttpJson(self._port)

    async def stop(self) -> None:
        while self._running:
            end(self._running.pop())

    def make(self, rng: Random) -> Input:
        return (self._json if rng.random() < 0.5 else self._bytes).make(rng)

    async def bystander(self) -> None:
        require_same(await good_answer(self._port), self._expected)

    newcomer = bystander


class MetricsTarget(Target):
    """A cloud's metrics; edges must not notice."""

    name = "metrics"

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._running: Process | None = None

    async def start(self) -> None:
        name = f"{self.name}-{next(_numbers)}"
        self._port = free_tcp_port()
        self.watched, address = await start_cloud(
            self._deployment, name, metrics=f"127.0.0.1:{self._port}"
        )
        self._running = self.watched
        self._client = GoodClient(self._deployment.edge_yaml(address, f"{name}-edge.yaml"))
        self._expected = await self._client.ask()
        paths = ("/metrics", "/metrics?name[]=x", "/health/live", "/health/ready", "/x")
        requests = [request("GET", path) for path in paths]
        self._bytes = HttpBytes(
            partial(Pipe.over_tcp, self._port), [*requests, request("POST", "/metrics", b"{}")]
        )

    async def stop(self) -> None:
        if self._running is not None:
            await self._client.aclose()
            end(self._running)
            self._running = None

    def make(self, rng: Random) -> Input:
        return self._bytes.make(rng)

    async def bystander(self) -> None:
        require_same(await self._client.ask(), self._expected)

    async def newcomer(self) -> None:
        try:
            status, body = await fetch(self._port, request("GET", "/metrics"))
        except OSError as error:
            raise Violation(f"the metrics could not be asked for: {error}") from error
        if status != 200 or b"privatelora_cloud_" not in body:
            raise Violation(f"the metrics are {status}: {body[:600]!r}")
        await self.bystander()
