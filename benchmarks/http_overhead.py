"""What the API costs: an edge's answers over HTTP, against the same edge's generator.

Method. A cloud daemon, and an edge in this process that serves HTTP and answers the benchmark
itself in turn: the same model, connection and prompt, one answer at a time. Over HTTP the official
OpenAI client asks, streaming, in a process of its own. Counted are the tokens between the first
piece of text and the last, end-of-sequence banned. Each round has one answer of both kinds, and
ratios are of one round.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from privatelora.benchmarks.measure import Spread, machine_facts, paired_ratios
from privatelora.benchmarks.serve import ServeSettings, edge_config, prepare, serving
from privatelora.cli._daemons import Daemon
from privatelora.errors import ConfigError
from privatelora.runtime.config import EdgeConfig
from privatelora.runtime.edge import Edge
from privatelora.runtime.generation import GenerationStats
from privatelora.runtime.http.server import HttpServer
from privatelora.runtime.loop import run

Report = Callable[[str], None]


@dataclass(frozen=True)
class HttpSettings:
    """``serving``: the deployment, its prompts and answers."""

    serving: ServeSettings
    rounds: int


@dataclass(frozen=True)
class _Answer:
    first_token_s: float
    seconds: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return (self.tokens - 1) / self.seconds


def measure_http(settings: HttpSettings, report: Report) -> dict[str, Any]:
    """Measure both ways at every distance."""
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("this benchmark needs the package openai: pip install openai")
    report("splitting the model")
    round_trips = prepare(settings.serving)
    with serving(settings.serving) as address:
        rows = [
            run(_measure(settings, address, rtt_ms, report)) for rtt_ms in settings.serving.rtts_ms
        ]
    return {
        "benchmark": "http",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {
            **settings.serving.deployment,
            "prompt_tokens": settings.serving.prompt_tokens,
            "tokens": settings.serving.tokens,
            "rounds": settings.rounds,
        },
        "round_trips_per_token": round_trips,
        "rows": rows,
    }


async def _measure(
    settings: HttpSettings, address: str, rtt_ms: float, report: Report
) -> dict[str, Any]:
    config = edge_config(address, rtt_ms) | {"http": {"listen": "127.0.0.1:0"}}
    directory = settings.serving.directory
    edge = Edge(EdgeConfig.model_validate(config, context={"directory": directory}))
    prompt_ids = [10 + 7 * i % 150 for i in range(settings.serving.prompt_tokens)]
    answers: dict[str, list[_Answer]] = {"http": [], "direct": []}
    try:
        await edge.connect()
        server = HttpServer(edge.service, edge.config.http)
        async with server.listening():
            with Daemon("privatelora.benchmarks.http_client", server.url) as client:
                await asyncio.to_thread(client.read_event, "ready")
                for number in range(-1, settings.rounds):  # one to warm up
                    report(f"{rtt_ms:g} ms: round {number + 1} of {settings.rounds}")
                    direct = await _direct(edge, prompt_ids, settings.serving.tokens)
                    over_http = await _over_http(client, prompt_ids, settings.serving.tokens)
                    if number >= 0:
                        answers["direct"].append(direct)
                        answers["http"].append(over_http)
    finally:
        await edge.aclose()
    rates = {name: [each.tokens_per_s for each in found] for name, found in answers.items()}
    firsts = {name: [each.first_token_s for each in found] for name, found in answers.items()}
    return {
        "rtt_ms": rtt_ms,
        "ratio": paired_ratios(rates["http"], rates["direct"])._asdict(),
        **{
            name: {
                "tokens_per_s": {**Spread.of(rates[name])._asdict(), "runs": rates[name]},
                "time_to_first_token_s": Spread.of(firsts[name])._asdict(),
            }
            for name in answers
        },
    }


async def _direct(edge: Edge, prompt_ids: list[int], tokens: int) -> _Answer:
    params = edge.service.params({"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True})
    stats = GenerationStats()
    started = time.perf_counter()
    async with aclosing(edge.service.stream(None, prompt_ids, params, stats)) as pieces:
        times = [time.perf_counter() async for _ in pieces]
    return _Answer(times[0] - started, times[-1] - times[0], stats.completion_tokens)


async def _over_http(client: Daemon, prompt_ids: list[int], tokens: int) -> _Answer:
    client.write_line(json.dumps({"prompt_ids": prompt_ids, "tokens": tokens}))
    found = await asyncio.to_thread(client.read_event, "answered")
    return _Answer(found["first_token_s"], found["seconds"], found["tokens"])
