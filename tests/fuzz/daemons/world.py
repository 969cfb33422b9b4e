"""The tiny model behind every target, its daemons, and clients that behave well."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

from privatelora.errors import CapacityError, PrivateLoRAError
from privatelora.runtime.config import load_edge_config
from privatelora.runtime.edge import Edge
from privatelora.runtime.generation import GenerationStats
from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import SERVE, Process
from tests.fuzz.daemons.inputs import Violation

PROMPT = "How many apples has she?"
NUM_TOKENS = 16
DEADLINE_S = 20.0
"""Longest wait of a client that behaves well, on a machine that others use too."""

CLOUD_LIMITS: dict[str, Any] = {
    "max_sessions": 1024,
    "max_sessions_per_client": 1024,
    "max_waiting": 1024,
    "max_cached_positions": 16384,
    "resume_timeout_s": 0.5,
    "training": {"max_sessions": 1024},
}
"""All peers here are one client, which must not use up what the others need; and all the memory of
the caches is soon in use, and none is added to it."""


def make_deployment(directory: Path) -> Deployment:
    """Split a tiny Llama with two exchanges on the wire and one that opens a step."""
    return tiny_deployment("llama", directory, rank_up=8, rank_down=8)[0]


async def started(module: str, config: Path) -> tuple[Process, str]:
    """A daemon, and its address. The event loop goes on meanwhile: it may be asked something."""
    process = Process(module, config)
    try:
        return process, await asyncio.to_thread(process.read_ready)
    except BaseException:
        end(process)
        raise


async def start_cloud(deployment: Deployment, name: str, **settings: Any) -> tuple[Process, str]:
    """A cloud and its address."""
    config = deployment.cloud_yaml(f"{name}.yaml", **{**CLOUD_LIMITS, **settings})
    return await started(SERVE, config)


def end(process: Process) -> None:
    """Kill a program and close what belongs to it."""
    process.__exit__(None, None, None)


class GoodClient:
    """An edge in this process. It asks one question, always the same."""

    def __init__(self, config: Path) -> None:
        self._edge = Edge(load_edge_config(config))

    async def ask(self) -> str:
        """The answer, in time. Raises Violation; waits as it is told while the cloud is full."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    try:
                        return await self._answer()
                    except CapacityError as error:
                        await asyncio.sleep(error.retry_after_s or 0.1)
        except TimeoutError as error:
            raise Violation(f"a good client had no answer in {DEADLINE_S:g} s") from error
        except PrivateLoRAError as error:
            raise Violation(f"a good client failed: {type(error).__name__}: {error}") from error

    async def _answer(self) -> str:
        text, service = self._edge.text, self._edge.service
        params = service.params({"max_tokens": NUM_TOKENS, "ignore_eos": True})
        pieces = service.stream(None, text.encode_prompt(PROMPT), params, GenerationStats())
        async with aclosing(pieces):
            return "".join([piece async for piece in pieces])

    async def aclose(self) -> None:
        await self._edge.aclose()


def require_same(text: str, expected: str) -> None:
    """Raise Violation for an answer that is not what an undisturbed client got."""
    if text != expected:
        raise Violation(f"a good client was answered {text!r} instead of {expected!r}")
