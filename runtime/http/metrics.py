"""What an edge's API does, in numbers for Prometheus (``GET /metrics``)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from privatelora.runtime.generation import GenerationStats

PREFIX = "privatelora_edge_"
TIME_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""In seconds."""


class EdgeMetrics:
    """The numbers of one edge, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            PREFIX + "requests", "Requests answered.", ("route", "status"), registry=registry
        )
        self._first_token = Histogram(
            PREFIX + "first_token_seconds",
            "Time from the start of an answer to its first token.",
            buckets=TIME_BOUNDS,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            PREFIX + "prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self._cached_tokens = Counter(
            PREFIX + "cached_tokens", "Tokens of prompts that were cached.", registry=registry
        )
        self._completion_tokens = Counter(
            PREFIX + "completion_tokens", "Tokens of answers.", registry=registry
        )
        self._sent = Counter(
            PREFIX + "sent_bytes", "Bytes sent to the cloud for answers.", registry=registry
        )
        self._received = Counter(
            PREFIX + "received_bytes",
            "Bytes received from the cloud for answers.",
            registry=registry,
        )
        self.active = Gauge(
            PREFIX + "active_answers", "Answers being generated or waiting.", registry=registry
        )

    def note_request(self, route: str, status: int) -> None:
        """A request was answered; ``route`` is its pattern, never the path a client chose."""
        self._requests.labels(route, status).inc()

    def note_answer(self, stats: GenerationStats) -> None:
        """An answer ended, however it did."""
        if stats.completion_tokens:
            self._first_token.observe(stats.time_to_first_token_s)
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._cached_tokens.inc(stats.cached_tokens)
        self._completion_tokens.inc(stats.completion_tokens)
        for traffic in (stats.prefill_traffic, stats.decode_traffic):
            self._sent.inc(traffic.sent_nbytes)
            self._received.inc(traffic.received_nbytes)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
