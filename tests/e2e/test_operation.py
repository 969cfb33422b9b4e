"""A cloud in the hands of a service manager: is it ready, how is it, and does it end well."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import EDGE, MAIN, PATIENCE_S, SERVE, Commands, Process

LONG = {"prompt": "How many apples?", "sampling": {"max_tokens": 600, "ignore_eos": True}}
METRICS = re.compile(r"metrics at http://(127\.0\.0\.1:\d+)/metrics")


class Watched(NamedTuple):
    """A cloud, where its metrics are, and the socket that its service manager listens on."""

    process: Process
    address: str
    metrics: str
    manager: socket.socket


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    directory = tmp_path_factory.mktemp("operation")
    options = {"max_position_embeddings": 4096}
    return tiny_deployment("llama", directory, model_options=options, rank_up=8, rank_down=8)[0]


@contextmanager
def cloud(deployment: Deployment, **settings: object) -> Iterator[Watched]:
    path = deployment.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE_S)
        manager.bind(str(path))
        try:
            config = deployment.cloud_yaml(metrics="127.0.0.1:0", **settings)
            environment = {"NOTIFY_SOCKET": str(path)}
            with Process(SERVE, config, "--verbose", environment=environment) as process:
                address = process.read_ready()
                found = METRICS.search(process.stderr)
                assert found, process.stderr
                yield Watched(process, address, found[1], manager)
        finally:
            path.unlink()


def health(metrics: str, what: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{metrics}/health/{what}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_an_answer_under_way_comes_to_its_end(deployment: Deployment) -> None:
    with cloud(deployment) as serving:
        assert serving.manager.recv(100) == b"READY=1"
        assert health(serving.metrics, "live") == (200, "live\n")
        assert health(serving.metrics, "ready") == (200, "ready\n")
        edge_file = deployment.edge_yaml(serving.address, max_positions=4096, reconnect_timeout_s=0)
        with (
            Process(EDGE, "--lines", edge_file) as edge,
            Process(EDGE, "--lines", edge_file) as late,
        ):
            for one in (edge, late):
                assert one.read_event()["event"] == "ready"
            edge.write(LONG)
            assert edge.read_event()["event"] == "text"
            serving.process.terminate()
            assert serving.manager.recv(100) == b"STOPPING=1"
            _, refused = late.ask(LONG)
            assert refused["kind"] == "CloudDraining"
            assert "this cloud is shutting down; try again later" in refused["error"]
            assert health(serving.metrics, "live")[0] == 200
            assert health(serving.metrics, "ready") == (503, "this cloud is shutting down\n")
            _, done = edge.read_answer()
            assert done["event"] == "done"
            assert done["figures"]["completion_tokens"] == 600
            assert serving.process.wait() == 0
        assert "go on no more" not in serving.process.stderr


@pytest.mark.parametrize("impatience", ["second signal", "drain_timeout_s"])
def test_it_can_be_hurried(deployment: Deployment, impatience: str) -> None:
    timeout_s = 0.2 if impatience == "drain_timeout_s" else PATIENCE_S
    with cloud(deployment, drain_timeout_s=timeout_s, min_idle_s=PATIENCE_S) as serving:
        edge_file = deployment.edge_yaml(serving.address, max_positions=4096, reconnect_timeout_s=0)
        with Process(EDGE, "--lines", edge_file) as edge:
            assert edge.read_event()["event"] == "ready"
            edge.write(LONG)
            assert edge.read_event()["event"] == "text"
            serving.process.terminate()
            assert serving.manager.recv(100) == b"READY=1"
            assert serving.manager.recv(100) == b"STOPPING=1"
            if impatience == "second signal":
                serving.process.terminate()
            assert serving.process.wait() == 0
            _, lost = edge.read_answer()
            assert lost["event"] == "error"
            assert lost["kind"] in ("ConnectionClosed", "TransportError", "CapacityError")


# privatelora status


def test_status_of_a_cloud(deployment: Deployment, commands: Commands) -> None:
    with cloud(deployment) as serving:
        shown = commands.run(MAIN, "status", serving.metrics)
        assert (shown.code, shown.err) == (0, "")
        assert re.search(r"^state +ready$", shown.out, re.MULTILINE)
        assert re.search(r"^sessions +0 open, 0 wait, 0 may come back$", shown.out, re.MULTILINE)
        assert re.search(r"^KV cache +0 of [\d,]+ blocks \(0%\)$", shown.out, re.MULTILINE)
        # A file names the port; that of this cloud was any free one.
        file = deployment.cloud_yaml("status.yaml", metrics=serving.metrics)
        told = commands.run(MAIN, "status", file, "--json").json
        assert (told["kind"], told["state"], told["sessions"]) == ("cloud", "ready", 0)
        assert told["per_second"]["positions"] == 0


def test_status_of_what_is_not_there(
    deployment: Deployment, commands: Commands, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nowhere = f"127.0.0.1:{server.getsockname()[1]}"
    without = deployment.cloud_yaml("without.yaml")
    free = deployment.cloud_yaml("free.yaml", metrics="127.0.0.1:0")
    for where, said in (
        (nowhere, f"nothing tells its status at http://{nowhere}: connection refused; check"),
        (without, "this cloud does not tell how it is; set metrics: 127.0.0.1:9464"),
        (free, "metrics: port 0 is any free one"),
        ("somewhere", "'somewhere' is neither a YAML file nor an address such as"),
        (tmp_path / "nowhere.yaml", "No such file or directory"),
    ):
        result = commands.run(MAIN, "status", where)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert said in result.err
