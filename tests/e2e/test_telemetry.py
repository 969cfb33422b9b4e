"""A cloud that is watched: its metrics over HTTP, its trace and its log, from real processes."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import EDGE, SERVE, Process

FAMILIES = {
    "batch_rows": "histogram",
    "batch_steps": "histogram",
    "batch_compute_seconds": "histogram",
    "queue_seconds": "histogram",
    "reply_seconds": "histogram",
    "batches_total": "counter",
    "rows_total": "counter",
    "positions_total": "counter",
    "segment_batches_total": "counter",
    "segment_rows_total": "counter",
    "segment_compute_seconds_total": "counter",
    "segment_queue_seconds_total": "counter",
    "point_replies_total": "counter",
    "point_reply_seconds_total": "counter",
    "sessions_opened_total": "counter",
    "sessions_refused_total": "counter",
    "sessions_evicted_total": "counter",
    "sessions_resumed_total": "counter",
    "sent_bytes_total": "counter",
    "received_bytes_total": "counter",
    "connections": "gauge",
    "sessions": "gauge",
    "detached_sessions": "gauge",
    "waiting_sessions": "gauge",
    "kv_blocks_used": "gauge",
    "kv_blocks": "gauge",
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    directory = tmp_path_factory.mktemp("telemetry")
    return tiny_deployment("llama", directory, rank_up=8, rank_down=8)[0]


def test_metrics_trace_and_log_of_a_cloud(deployment: Deployment) -> None:
    config = deployment.cloud_yaml(metrics="127.0.0.1:0", trace="trace.json")
    with Process(SERVE, config, "--verbose", "--log-format", "json") as cloud:
        address = cloud.read_ready()
        messages = [json.loads(line)["message"] for line in cloud.stderr.splitlines()]
        (url,) = (found[1] for text in messages if (found := re.match(r"metrics at (.+)", text)))
        with Process(EDGE, "--lines", deployment.edge_yaml(address)) as edge:
            assert edge.read_event()["event"] == "ready"
            _, done = edge.ask({"prompt": "How many?", "sampling": {"max_tokens": 8}})
            assert done["event"] == "done", done
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain")
                text = answer.read().decode()
        cloud.terminate()
        assert cloud.wait() == 0, cloud.stderr
        log = [json.loads(line) for line in cloud.stderr.splitlines()]

    types = dict(re.findall(r"^# TYPE privatelora_cloud_(\w+) (\w+)$", text, re.MULTILINE))
    assert types == FAMILIES
    values = dict(re.findall(r"^privatelora_cloud_(\w+) (\S+)$", text, re.MULTILINE))
    assert float(values["sessions_opened_total"]) >= 1
    assert float(values["reply_seconds_count"]) > 0

    events = json.loads((deployment.directory / "trace.json").read_text())["traceEvents"]
    batches = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    assert len(batches) >= float(values["batches_total"])

    assert {*log[-1]} == {"time", "level", "logger", "message"}
    assert log[-1]["message"] == "stopping"


def test_every_metric_is_documented() -> None:
    named = re.findall(r"^\| `(\w+)` \| (\w+) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert dict(named) == FAMILIES


@pytest.mark.parametrize("setting", ["metrics", "trace"])
def test_what_cannot_be_is_said_before_serving(deployment: Deployment, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        value, said = {
            "metrics": (f"127.0.0.1:{taken.getsockname()[1]}", "error: cannot serve metrics on"),
            "trace": ("nowhere/trace.json", "error: cannot write the trace"),
        }[setting]
        config = deployment.cloud_yaml(f"bad-{setting}.yaml", **{setting: value})
        with Process(SERVE, config) as cloud:
            assert cloud.wait() == 1
            assert cloud.read_rest() == []
            assert cloud.stderr.startswith(said)
            assert cloud.stderr.count("\n") == 1
