"""Clouds that are killed in the middle of an answer: a pause, and the same words."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.http_world import until
from tests.e2e.processes import EDGE, SERVE, Process

MAX_POSITIONS = 1024
PROMPT = "The weather in the mountains"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    options = {"max_position_embeddings": MAX_POSITIONS}
    directory = tmp_path_factory.mktemp("interruptions")
    return tiny_deployment("llama", directory, model_options=options, rank_up=8, rank_down=8)[0]


@dataclass
class Running:
    """Both daemons; the cloud may be another one at the same address."""

    deployment: Deployment
    stack: ExitStack
    cloud: Process
    edge: Process
    address: str
    client: openai.OpenAI

    def stream(self, **sampling: Any) -> Iterator[str]:
        body = {"ignore_eos": True, **sampling.pop("extra_body", {})}
        chunks = self.client.completions.create(
            model="adapter", prompt=PROMPT, max_tokens=400, stream=True, extra_body=body, **sampling
        )
        for chunk in chunks:
            yield from (choice.text for choice in chunk.choices)

    def replace_cloud(self) -> None:
        """As after a crash: nothing of the old one is left."""
        self.cloud.kill()
        self.cloud.wait()
        config = self.deployment.cloud_yaml("again.yaml", listen=self.address)
        self.cloud = self.stack.enter_context(Process(SERVE, config))
        assert self.cloud.read_ready() == self.address


@contextmanager
def running(deployment: Deployment, **edge_settings: Any) -> Iterator[Running]:
    with ExitStack() as stack:
        cloud = stack.enter_context(Process(SERVE, deployment.cloud_yaml()))
        address = cloud.read_ready()
        settings = {"http": {"listen": "127.0.0.1:0"}, "max_positions": MAX_POSITIONS}
        edge_file = deployment.edge_yaml(address, **settings, **edge_settings)
        edge = stack.enter_context(Process(EDGE, edge_file))
        client = stack.enter_context(
            openai.OpenAI(base_url=f"{edge.read_ready()}/v1", api_key="x", max_retries=0)
        )
        yield Running(deployment, stack, cloud, edge, address, client)
        edge.terminate()
        assert edge.wait() == 0
        assert "Traceback" not in edge.stderr


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"]
)
def test_a_killed_cloud_is_a_pause(deployment: Deployment, sampling: dict[str, Any]) -> None:
    with running(deployment) as world:
        undisturbed = list(world.stream(**sampling))
        pieces = world.stream(**sampling)
        disturbed = [next(pieces) for _ in range(20)]
        world.replace_cloud()
        disturbed += [next(pieces) for _ in range(100)]
        world.replace_cloud()
        disturbed += pieces
        assert "".join(disturbed) == "".join(undisturbed)


def test_a_cloud_that_falls_silent_is_a_pause(deployment: Deployment) -> None:
    with running(deployment, step_timeout_s=1, connect_timeout_s=1) as world:
        undisturbed = list(world.stream())
        pieces = world.stream()
        disturbed = [next(pieces) for _ in range(20)]
        stopped = psutil.Process(world.cloud.pid)
        stopped.send_signal(signal.SIGSTOP)
        until(lambda: "trying to go on" in world.edge.stderr)
        stopped.send_signal(signal.SIGCONT)
        disturbed += pieces
        assert "".join(disturbed) == "".join(undisturbed)
