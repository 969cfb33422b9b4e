"""Daemons where something runs out, is restarted, or is there twice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest

from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import EDGE, SERVE, Process, usual_environment

PROMPT = "The weather in the mountains"
FULL = Path("/dev/full")

needs_full_disk = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    options = {"max_position_embeddings": 512}
    directory = tmp_path_factory.mktemp("hard-times")
    return tiny_deployment("llama", directory, model_options=options, rank_up=8, rank_down=8)[0]


@contextmanager
def asking(edge: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{edge.read_ready()}/v1", api_key="x", max_retries=0) as client:
        yield client


def answer(client: openai.OpenAI, prompt: str = PROMPT) -> str:
    reply = client.completions.create(
        model="adapter", prompt=prompt, max_tokens=24, extra_body={"ignore_eos": True}
    )
    return reply.choices[0].text


def edge_file(deployment: Deployment, address: str, name: str = "edge.yaml") -> Path:
    return deployment.edge_yaml(address, name, http={"listen": "127.0.0.1:0"})


@needs_full_disk
def test_a_full_disk_for_logs_changes_nothing(deployment: Deployment) -> None:
    with ExitStack() as stack:
        cloud = stack.enter_context(
            Process(SERVE, "--verbose", deployment.cloud_yaml(), stderr=FULL)
        )
        edge = stack.enter_context(
            Process(EDGE, "--verbose", edge_file(deployment, cloud.read_ready()), stderr=FULL)
        )
        with asking(edge) as client:
            assert answer(client) == answer(client)
            with pytest.raises(openai.BadRequestError):
                answer(client, "too long " * 4000)
            assert len(answer(client)) > 0
        for process in (edge, cloud):
            process.terminate()
            assert process.wait() == 0


@needs_full_disk
def test_a_daemon_that_cannot_say_that_it_is_ready_says_so(deployment: Deployment) -> None:
    with FULL.open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", SERVE, str(deployment.cloud_yaml())],
            stdout=full,
            stderr=subprocess.PIPE,
            env=usual_environment(),
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr == b"error: cannot write to standard output: No space left on device\n"


def test_a_cloud_that_is_restarted_in_order_is_a_pause(deployment: Deployment) -> None:
    """The old one drains, as it is asked to, and the new one takes over at the same address."""
    with ExitStack() as stack:
        config = deployment.cloud_yaml("draining.yaml", drain_timeout_s=0.2)
        cloud = stack.enter_context(Process(SERVE, config))
        address = cloud.read_ready()
        edge = stack.enter_context(Process(EDGE, edge_file(deployment, address)))
        with asking(edge) as client:
            expected = answer(client)

            def stream() -> Iterator[str]:
                for chunk in client.completions.create(
                    model="adapter",
                    prompt=PROMPT,
                    max_tokens=400,
                    stream=True,
                    extra_body={"ignore_eos": True},
                ):
                    yield from (choice.text for choice in chunk.choices)

            undisturbed = "".join(stream())
            pieces = stream()
            disturbed = [next(pieces) for _ in range(10)]
            cloud.terminate()
            assert cloud.wait() == 0
            again = deployment.cloud_yaml("again.yaml", listen=address)
            stack.enter_context(Process(SERVE, again)).read_ready()
            disturbed += pieces
            assert "".join(disturbed) == undisturbed
            assert answer(client) == expected


def test_two_edges_with_one_identity_do_not_disturb_each_other(deployment: Deployment) -> None:
    """Of one machine, so of one client: each loses its link in turn, and goes on with its own."""
    with ExitStack() as stack:
        cloud = stack.enter_context(Process(SERVE, deployment.cloud_yaml()))
        address = cloud.read_ready()
        files = [edge_file(deployment, address, f"edge-{number}.yaml") for number in range(2)]
        edges = [stack.enter_context(Process(EDGE, file)) for file in files]
        clients = [stack.enter_context(asking(edge)) for edge in edges]
        expected = answer(clients[0])
        assert answer(clients[1]) == expected
        for _ in range(2):
            cloud.kill()
            cloud.wait()
            config = deployment.cloud_yaml("again.yaml", listen=address)
            cloud = stack.enter_context(Process(SERVE, config))
            cloud.read_ready()
            assert [answer(client) for client in clients] == [expected] * 2
