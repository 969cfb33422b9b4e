"""The second turn of a long conversation, against the same words from a cold start.

Method. A cloud daemon, and an edge that answers in this process over an impaired link, with the
default payload codecs. A conversation of ``history_tokens`` gets one more question: on the edge
that gave the answer before, and on an edge to which all of it is new, alternating. Both have an
open connection; the prompts have the same length and differ from their first words on, so that
nothing of another is cached. Counted until the first token: tokens run, bytes to the cloud, time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from privatelora.benchmarks.measure import Spread, machine_facts, paired_ratios
from privatelora.benchmarks.serve import ServeSettings, edge_config, prepare, serving
from privatelora.runtime.chat import ChatMessage
from privatelora.runtime.config import EdgeConfig
from privatelora.runtime.edge import Edge
from privatelora.runtime.generation import GenerationStats
from privatelora.runtime.loop import run
from privatelora.runtime.sampling_params import SamplingParams

Report = Callable[[str], None]
ANSWER_TOKENS = 8
SENTENCE = "The ferry to the island leaves at seven, and again when the tide allows it. "


@dataclass(frozen=True)
class TurnsSettings:
    """``history_tokens``: of the conversation before the second question, about."""

    serving: ServeSettings
    history_tokens: int
    rounds: int


def measure_turns(settings: TurnsSettings, report: Report) -> dict[str, Any]:
    """Measure second turns and cold starts at every distance."""
    report("splitting the model")
    round_trips = prepare(settings.serving)
    with serving(settings.serving) as address:
        rows = [
            run(_measure(settings, address, rtt_ms, report)) for rtt_ms in settings.serving.rtts_ms
        ]
    return {
        "benchmark": "turns",
        "method": __doc__,
        "machine": machine_facts(),
        "settings": {
            **settings.serving.deployment,
            "history_tokens": settings.history_tokens,
            "rounds": settings.rounds,
        },
        "round_trips_per_token": round_trips,
        "rows": rows,
    }


async def _measure(
    settings: TurnsSettings, address: str, rtt_ms: float, report: Report
) -> dict[str, Any]:
    config = edge_config(address, rtt_ms) | {"max_positions": 8192, "max_conversations": 2}
    del config["payload"]
    directory = settings.serving.directory
    edge = Edge(EdgeConfig.model_validate(config, context={"directory": directory}))
    second: list[GenerationStats] = []
    cold: list[GenerationStats] = []
    try:
        for number in range(settings.rounds):
            report(f"round {number + 1} of {settings.rounds} at {rtt_ms:g} ms")
            conversation = _history(edge, settings.history_tokens, f"Ferry {number}")
            await _answer(edge, conversation)
            second.append(await _answer(edge, _second(conversation)))
            new = _history(edge, settings.history_tokens, f"Boats {number}")
            cold.append(await _answer(edge, _second(new)))
    finally:
        await edge.aclose()
    figures = {"second_turn": second, "cold_start": cold}
    times = {name: [one.time_to_first_token_s for one in all_] for name, all_ in figures.items()}
    return {
        "rtt_ms": rtt_ms,
        "speedup": paired_ratios(times["cold_start"], times["second_turn"])._asdict(),
        **{
            name: {
                "prompt_tokens": all_[0].prompt_tokens,
                "tokens_run": all_[0].prompt_tokens - all_[0].cached_tokens,
                "bytes_to_cloud": all_[0].prefill_traffic.sent_nbytes,
                "time_to_first_token_s": Spread.of(times[name])._asdict(),
            }
            for name, all_ in figures.items()
        },
    }


def _history(edge: Edge, num_tokens: int, title: str) -> list[ChatMessage]:
    """A first question of about this many tokens."""
    per_sentence = len(edge.text.encode_prompt(SENTENCE))
    words = SENTENCE * max(1, num_tokens // per_sentence)
    return [{"role": "system", "content": title}, {"role": "user", "content": words}]


def _second(messages: list[ChatMessage]) -> list[ChatMessage]:
    # What the model would say here does not matter; the words before it are cached either way.
    return [
        *messages,
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "When does it leave?"},
    ]


async def _answer(edge: Edge, messages: list[ChatMessage]) -> GenerationStats:
    stats = GenerationStats()
    params = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    async for _ in edge.service.stream(None, edge.text.encode_chat(messages), params, stats):
        pass
    return stats
