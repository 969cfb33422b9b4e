"""A cloud, an edge that answers over HTTP, and a relay between them; and what is done to them."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import openai

from privatelora.runtime.config import CloudConfig, EdgeConfig
from tests.chaos.clients import RECONNECT_TIMEOUT_S, AskAgainError, LostError
from tests.chaos.daemon import Daemon, EndedEarlyError
from tests.chaos.faults import Fault
from tests.chaos.outcome import Record
from tests.chaos.questions import Question
from tests.chaos.relay import Spoiler
from tests.chaos.setups import Setup
from tests.e2e.deployment import Deployment
from tests.e2e.forker import Forker
from tests.e2e.processes import EDGE, SERVE
from tests.transports.cases import free_tcp_port

MAX_POSITIONS = 1024
START_PATIENCE_S = 60.0
STOP_PATIENCE_S = 30.0
MAX_TAIL_LINES = 12
DEFECT = re.compile(
    r"Traceback|never retrieved|never awaited|was destroyed but it is pending", re.IGNORECASE
)
"""What no daemon may ever log."""

CLOUD_SETTINGS: Mapping[str, Any] = {
    "drain_timeout_s": 3,
    "min_idle_s": 0.5,
    "max_silence_s": 6,
    "resume_timeout_s": 20,
}
EDGE_SETTINGS: Mapping[str, Any] = {
    "max_positions": MAX_POSITIONS,
    "prefill_chunk": 16,
    "connect_timeout_s": 2,
    "step_timeout_s": 2,
    "keepalive_s": 1,
    "reconnect_timeout_s": RECONNECT_TIMEOUT_S,
}
"""So that silence is noticed soon."""


class World:
    """Both daemons of one transport, started again whenever they end."""

    def __init__(
        self, setup: Setup, deployment: Deployment, forker: Forker, folder: Path, record: Record
    ) -> None:
        """``folder``: for logs and settings; it is there."""
        self.relay = setup.relay
        self.daemons: dict[str, Daemon] = {}
        """Those that are ready, by name: cloud, edge."""
        self.metrics_url = ""
        self._forker = forker
        self._folder = folder
        self._record = record
        self._num_starts = {"cloud": 0, "edge": 0}
        self._up = {name: asyncio.Event() for name in self._num_starts}
        self._edge_life = 0
        self._watchers: set[asyncio.Task[None]] = set()
        metrics, http = (f"127.0.0.1:{free_tcp_port()}" for _ in range(2))
        self.metrics_url = f"http://{metrics}/metrics"
        cloud = {**CLOUD_SETTINGS, **setup.cloud_settings, "metrics": metrics}
        edge = {**EDGE_SETTINGS, **setup.edge_settings, "http": {"listen": http}}
        name = folder.name
        self._configs = {
            "cloud": deployment.cloud_yaml(
                f"{name}-cloud.yaml", listen=setup.listen, **known(cloud, CloudConfig)
            ),
            "edge": deployment.edge_yaml(
                setup.contact, f"{name}-edge.yaml", **known(edge, EdgeConfig)
            ),
        }
        self._client = openai.AsyncOpenAI(
            base_url=f"http://{http}/v1",
            api_key="x",
            max_retries=0,
            timeout=None,
            default_headers={"Connection": "close"},  # none is kept to an edge that is killed
        )

    async def start(self) -> None:
        """Start all of it. Raises EndedEarlyError or TimeoutError."""
        await self.relay.start()
        await self._start("cloud")
        await self._start("edge")

    async def aclose(self) -> None:
        """End both daemons as their service manager would; note what they complain about."""
        for name in ("edge", "cloud"):
            if name in self.daemons:
                await self._stop(name)
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self._client.close()
        await self.relay.aclose()
        for log in sorted(self._folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            defects = [i for i, line in enumerate(lines) if DEFECT.search(line)]
            if defects:
                context = lines[max(0, defects[0] - 3) : defects[0] + 40]
                self._record.failure(
                    f"{log.stem} logged a defect, {len(defects)} in all", {log.stem: context}
                )

    def tails(self) -> dict[str, list[str]]:
        """The last lines of each daemon's log, over its restarts."""
        return {name: self._tail(name) for name in self._num_starts}

    async def ask(self, question: Question) -> AsyncGenerator[str, None]:
        """Send a request as soon as there is an edge. Raises AskAgainError or LostError."""
        await self._up["edge"].wait()
        life = self._edge_life
        reason = None
        problem: Exception | None = None
        options = question.sampling()
        extra = {"ignore_eos": options.pop("ignore_eos")}
        try:
            stream = await self._client.completions.create(
                model="adapter", prompt=question.prompt, stream=True, extra_body=extra, **options
            )
            async with stream:
                async for chunk in stream:
                    for choice in chunk.choices:
                        reason = choice.finish_reason or reason
                        yield choice.text
        except Exception as error:  # of the API, or of whatever library is beneath it
            problem = error
        if reason is None or problem is not None:
            if self._edge_life != life:
                raise AskAgainError
            if problem is None:
                raise LostError("the stream ended early")
            raise LostError(f"{type(problem).__name__}: {problem}")

    async def apply(self, fault: Fault) -> None:
        """Do it, and wait until the daemons run again, if it ends one. Raises as ``start``."""
        relay = self.relay
        match fault.kind:
            case "kill cloud":
                await self._end("cloud", signal.SIGKILL)
                await self._start("cloud")
            case "kill edge":
                await self._end("edge", signal.SIGKILL)
                await self._start("edge")
            case "restart cloud":
                await self._stop("cloud")
                await self._start("cloud")
            case "stop cloud":
                cloud = await self._running("cloud")
                cloud.send(signal.SIGSTOP)
                await asyncio.sleep(fault.duration_s)
                cloud.send(signal.SIGCONT)
            case "drop":
                relay.drop()
            case "storm":
                await relay.storm(fault.duration_s, refuses=fault.refuses)
            case "half-open":
                relay.half_open(upwards=fault.upwards)
            case "stall":
                await relay.stall(fault.duration_s)
            case "truncate" | "corrupt":
                spoiler = Spoiler(fault.kind == "truncate", fault.seed)
                relay.spoilers[fault.upwards].append(spoiler)
            case "delay":
                await relay.delay(fault.delay_s, fault.duration_s)

    async def _start(self, name: str) -> None:
        """Start a daemon; again while it ends because it cannot reach the other yet."""
        async with asyncio.timeout(START_PATIENCE_S):
            while True:
                self._num_starts[name] += 1
                log = self._folder / f"{name}-{self._num_starts[name]:04}.log"
                module = {"cloud": SERVE, "edge": EDGE}[name]
                daemon = Daemon(self._forker, log, module, self._configs[name], "--verbose")
                try:
                    await daemon.ready()
                except EndedEarlyError:
                    if name == "cloud":
                        raise
                    await asyncio.sleep(0.2)
                    continue
                break
        self.daemons[name] = daemon
        self._up[name].set()
        watcher = asyncio.create_task(self._watch(name, daemon))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _watch(self, name: str, daemon: Daemon) -> None:
        await daemon.ended.wait()
        if not daemon.is_expected_to_end:
            self._forget(name)
            self._record.failure(
                f"the {name} ended by itself with status {daemon.status}", self.tails()
            )
            await self._start(name)

    async def _end(self, name: str, number: signal.Signals) -> None:
        daemon = await self._running(name)
        self._forget(name)
        daemon.send(number)
        await daemon.ended.wait()

    async def _running(self, name: str) -> Daemon:
        """The daemon of that name, once it is there."""
        async with asyncio.timeout(START_PATIENCE_S):
            await self._up[name].wait()  # it may have ended by itself
        return self.daemons[name]

    async def _stop(self, name: str) -> None:
        """Ask it to end; it has to do so in time and with status 0."""
        daemon = await self._running(name)
        try:
            async with asyncio.timeout(STOP_PATIENCE_S):
                await self._end(name, signal.SIGTERM)
        except TimeoutError:
            self._record.failure(
                f"the {name} did not end within {STOP_PATIENCE_S:g} s of SIGTERM", self.tails()
            )
            daemon.send(signal.SIGKILL)
            await daemon.ended.wait()
        else:
            if daemon.status != 0:
                self._record.failure(
                    f"the {name} ended with status {daemon.status} on SIGTERM", self.tails()
                )

    def _forget(self, name: str) -> None:
        """It is not there any more, from now on."""
        del self.daemons[name]
        self._up[name].clear()
        if name == "edge":
            self._edge_life += 1

    def _tail(self, name: str) -> list[str]:
        lines: list[str] = []
        for log in sorted(self._folder.glob(f"{name}-*.log"), reverse=True):
            lines = log.read_text(errors="replace").splitlines()[-MAX_TAIL_LINES:] + lines
            if len(lines) >= MAX_TAIL_LINES:
                break
        return lines[-MAX_TAIL_LINES:]


def known(settings: Mapping[str, Any], config: type[CloudConfig | EdgeConfig]) -> dict[str, Any]:
    """Those of ``settings`` that this version of a daemon has."""
    return {name: value for name, value in settings.items() if name in config.model_fields}
