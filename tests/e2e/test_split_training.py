"""Training through a cloud of another process, whatever becomes of either in the middle of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.deployment import Deployment, split_checkpoint
from tests.e2e.forker import Forker
from tests.e2e.http_world import until
from tests.e2e.processes import EDGE, SERVE, TRAIN
from tests.partition.tiny import save_tiny

# What is asked of a Forker and not answered in time would be taken for its next answer.
pytestmark = pytest.mark.timeout(600)

FACTS = [{"prompt": f"What is {word}?", "completion": word * 3} for word in "abcdef"]
NUM_STEPS, SAVE_STEPS = 24, 8


@dataclass
class Program:
    """One that was started. Its exit status is asked for once, with ``end``."""

    forker: Forker
    pid: int
    stdout: Path
    stderr: Path

    def ready(self) -> str:
        """Wait until it can be connected to; where."""
        until(lambda: self.stdout.exists() and self.stdout.read_text().endswith("\n"))
        word, address = self.stdout.read_text().split()
        assert word == "ready"
        return address

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        return self.forker.status(self.pid)

    def results(self) -> dict[str, Any]:
        """Wait for the end of a run that goes well; what it printed."""
        assert self.end() == 0, self.stderr.read_text()
        found: dict[str, Any] = json.loads(self.stdout.read_text())
        return found


@dataclass
class Site:
    """A folder with both shards, facts, and whatever runs on them."""

    directory: Path
    deployment: Deployment
    forker: Forker
    num_started: int = 0

    def start(self, module: str, *arguments: object) -> Program:
        self.num_started += 1
        stdout, stderr = (self.directory / f"{self.num_started}.{kind}" for kind in ("out", "err"))
        pid = self.forker.start(module, *arguments, stdout=str(stdout), stderr=str(stderr))
        return Program(self.forker, pid, stdout, stderr)

    def cloud(self, listen: str = "tcp://127.0.0.1:0", **settings: Any) -> Program:
        name = f"cloud-{self.num_started}.yaml"
        return self.start(SERVE, self.deployment.cloud_yaml(name, listen=listen, **settings))

    def train(
        self, out: str, address: str, *options: str, evaluate: bool = False, slowly: bool = False
    ) -> Program:
        """Start or go on with the one run that everything here does, its files in ``out``.

        ``slowly``: over a network that leaves time for something to happen before its end.
        """
        impaired = {"up": {"delay_ms": 15.0}} if slowly else None
        edge = self.deployment.edge_yaml(
            address, f"edge-{out}.yaml", adapter=None, impaired=impaired
        )
        source = {"kind": "jsonl", "path": "facts.jsonl"}
        settings = {
            "mode": "split",
            "edge": str(edge),
            "out": out,
            "data": {
                "train": [source],
                "evaluate": {"facts": [source]} if evaluate else {},
                "max_answer_tokens": 6,
            },
            "retention": None,  # the same steps, in less time
            "trainer": {
                "max_steps": NUM_STEPS,
                "save_steps": SAVE_STEPS,
                "learning_rate": 0.05,
                "logging_steps": 1,
                "report_to": [],
            },
        }
        file = self.directory / f"{out}.yaml"
        file.write_text(json.dumps(settings))  # which is YAML too
        return self.start(TRAIN, file, "--json", *options)

    def adapter(self, out: str) -> tuple[Any, bytes]:
        """The file's header and its numbers: entries of the header come in any order."""
        data = (self.directory / out / "adapter.safetensors").read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end]), data[end:]

    def wait_for_checkpoint(self, out: str) -> None:
        """Until the first one is complete: this file is written last."""
        folder = self.directory / out / "checkpoints" / f"checkpoint-{SAVE_STEPS}"
        last = folder / "trainer_state.json"
        until(lambda: last.exists() and last.read_text().endswith("}\n"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("split")
    model = save_tiny("llama", directory / "model")
    deployment = split_checkpoint(
        str(model), directory / "shards", every=2, rank_up=8, rank_down=8, std=0.0
    )
    (directory / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    with Forker() as forker:
        yield Site(directory, deployment, forker)


@pytest.fixture(scope="module")
def address(site: Site) -> str:
    """Of a cloud that nothing happens to."""
    return site.cloud(training={}).ready()


@pytest.fixture(scope="module")
def undisturbed(site: Site, address: str) -> dict[str, Any]:
    """What the run comes to, whose adapter is in ``undisturbed``."""
    results = site.train("undisturbed", address, evaluate=True).results()
    assert len(losses(results)) == NUM_STEPS
    assert losses(results)[-1] < losses(results)[0] - 1
    return results


def losses(results: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in results["log"] if "loss" in entry]


def test_a_cloud_that_is_killed_is_a_pause(site: Site, undisturbed: dict[str, Any]) -> None:
    cloud = site.cloud(training={})
    address = cloud.ready()
    run = site.train("paused", address, slowly=True)
    site.wait_for_checkpoint("paused")
    cloud.send(signal.SIGKILL)
    assert cloud.end() == -signal.SIGKILL
    again = site.cloud(address, training={})
    assert again.ready() == address
    results = run.results()
    assert "trying to go on" in run.stderr.read_text()
    assert losses(results) == losses(undisturbed)
    assert site.adapter("paused") == site.adapter("undisturbed")
    again.send(signal.SIGTERM)
    assert again.end() == 0
    assert "Traceback" not in again.stderr.read_text()


def test_a_run_that_was_asked_to_stop_goes_on_as_if_it_had_not(
    site: Site, address: str, undisturbed: dict[str, Any]
) -> None:
    run = site.train("stopped", address, slowly=True)
    site.wait_for_checkpoint("stopped")
    run.send(signal.SIGTERM)
    assert run.results()["stopped_early"]
    results = site.train("stopped", address, "--resume").results()
    assert losses(results) == losses(undisturbed)
    assert site.adapter("stopped") == site.adapter("undisturbed")


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    site: Site, address: str, undisturbed: dict[str, Any]
) -> None:
    run = site.train("killed", address, slowly=True)
    site.wait_for_checkpoint("killed")
    run.send(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    assert not (site.directory / "killed" / "adapter.safetensors").exists()
    results = site.train("killed", address, "--resume").results()
    assert losses(results) == losses(undisturbed)
    assert site.adapter("killed") == site.adapter("undisturbed")


def test_a_cloud_that_does_not_train_ends_the_command_with_a_line(site: Site) -> None:
    run = site.train("refused", site.cloud().ready())
    assert run.end() == 1
    [line] = run.stderr.read_text().splitlines()
    assert "this cloud does not train: set training: in its file to let it" in line
    assert run.stdout.read_text() == ""


def test_what_was_trained_answers_the_same_when_it_is_served(
    site: Site, address: str, undisturbed: dict[str, Any]
) -> None:
    after = undisturbed["after"]["facts"]
    assert after["answers"] != undisturbed["before"]["facts"]["answers"]
    edge_file = site.deployment.edge_yaml(
        address,
        adapter=str(site.directory / "undisturbed" / "adapter.safetensors"),
        http={"listen": "127.0.0.1:0"},
    )
    edge = site.start(EDGE, edge_file)
    url = f"{edge.ready()}/v1"
    scored = site.start(TRAIN, site.directory / "undisturbed.yaml", "--score", url, "--json")
    assert scored.results()["facts"] == after
    edge.send(signal.SIGTERM)
    assert edge.end() == 0
