"""A cloud and an edge that answers over HTTP, each a process, for tests with real clients."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.e2e.deployment import Deployment
from tests.e2e.processes import EDGE, PATIENCE_S, SERVE, Process

MAX_POSITIONS = 4096


@dataclass
class HttpWorld:
    """Both daemons, ready. ``url``: of the edge's API, without ``/v1``."""

    deployment: Deployment
    cloud: Process
    edge: Process
    url: str
    metrics_url: str

    def cloud_metric(self, name: str) -> float:
        """One of the cloud's numbers, now."""
        with urllib.request.urlopen(self.metrics_url, timeout=PATIENCE_S) as answer:
            text = answer.read().decode()
        found = re.search(rf"^privatelora_cloud_{name} (\S+)$", text, re.MULTILINE)
        assert found is not None
        return float(found[1])


@contextmanager
def http_world(deployment: Deployment, **edge_settings: Any) -> Iterator[HttpWorld]:
    """Start both; at the end they are asked to end, and do, without complaints."""
    metrics_url = ""
    cloud_file = deployment.cloud_yaml("http-cloud.yaml", metrics="127.0.0.1:0")
    with Process(SERVE, cloud_file, "--verbose") as cloud:
        address = cloud.read_ready()
        found = re.search(r"http://127\.0\.0\.1:\d+/metrics", cloud.stderr)
        assert found is not None, cloud.stderr
        metrics_url = found[0]
        settings = {"http": {"listen": "127.0.0.1:0"}, **edge_settings}
        config = deployment.edge_yaml(address, "http-edge.yaml", **settings)
        with Process(EDGE, config) as edge:
            url = edge.read_ready()
            yield HttpWorld(deployment, cloud, edge, url, metrics_url)
            edge.terminate()
            assert edge.wait() == 0, edge.stderr
            assert edge.stderr == ""
            assert edge.read_rest() == []


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other processes bring about."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
