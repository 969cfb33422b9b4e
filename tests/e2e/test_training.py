"""From a file of facts to an adapter that is served, by the commands a person would use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.processes import EDGE, MAIN, SERVE, TRAIN, Commands, Process
from tests.partition.tiny import save_tiny

FACTS = [{"prompt": f"What is {word}?", "completion": word * 3} for word in "abcdef"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a tiny model, facts, and a run that trains on them."""
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    source = {"kind": "jsonl", "path": "facts.jsonl"}
    write(
        tmp_path / "train.yaml",
        model=str(tmp_path / "model"),
        out="out",
        method={"name": "privatelora", "every": 2, "rank_up": 8, "rank_down": 8},
        data={"train": [source], "evaluate": {"facts": [source]}, "max_answer_tokens": 6},
        retention={"num_replay": 4, "num_held_out": 4, "max_answer_tokens": 4},
        trainer={"max_steps": 12, "learning_rate": 0.05, "logging_steps": 1, "save_steps": 4},
    )
    return tmp_path


def write(path: Path, **settings: Any) -> Path:
    path.write_text(json.dumps(settings))  # which is YAML too
    return path


@contextmanager
def deployed(site: Path, **cloud: Any) -> Iterator[tuple[Path, Any]]:
    """A cloud and an edge of ``site/shards``; the edge's settings file, and how to run the edge."""
    settings = {
        "listen": "tcp://127.0.0.1:0",
        "shard": "shards/cloud",
        "dtype": "float32",
        "num_threads": 1,
        **cloud,
    }
    with Process(SERVE, write(site / "cloud.yaml", **settings)) as serving:
        edge = write(
            site / "edge.yaml",
            cloud=serving.read_ready(),
            shard="shards/edge",
            adapter="out/adapter.safetensors",
            payload="fp32",
            dtype="float32",
            num_threads=1,
            http={"listen": "127.0.0.1:0"},
        )
        yield edge, serving


def partition(site: Path, commands: Commands, *options: object) -> None:
    arguments = ("partition", site / "model", site / "shards", "--dtype", "float32", *options)
    result = commands.run(MAIN, *arguments)
    assert result.code == 0, result.err


def test_the_served_adapter_answers_as_it_did_in_the_trainer(
    site: Path, commands: Commands
) -> None:
    trained = commands.run(TRAIN, site / "train.yaml", "--json")
    assert trained.code == 0, trained.err
    after = trained.json["after"]["facts"]
    assert after["answers"] != trained.json["before"]["facts"]["answers"]
    partition(site, commands, "--plan", site / "out" / "plan.yaml")
    with deployed(site) as (edge_file, _), Process(EDGE, edge_file) as edge:
        url = f"{edge.read_ready()}/v1"
        scored = commands.run(TRAIN, site / "train.yaml", "--score", url, "--json")
    assert scored.code == 0, scored.err
    assert scored.json["facts"] == after


def test_an_adapter_is_refused_by_shards_of_another_arrangement(
    site: Path, commands: Commands
) -> None:
    assert commands.run(TRAIN, site / "train.yaml").code == 0
    partition(site, commands, "--rank-up", 8, "--rank-down", 8)
    with deployed(site) as (edge_file, _):
        refused = commands.run(EDGE, edge_file)
    assert refused.code == 1
    assert "was made for another arrangement: every is 2 there and 1" in refused.err


def test_training_can_be_stopped_and_gone_on_with(site: Path, commands: Commands) -> None:
    settings = yaml.safe_load((site / "train.yaml").read_text())
    settings["trainer"]["max_steps"] = 100_000
    long = write(site / "long.yaml", **{**settings, "out": "long"})
    with Process(TRAIN, long, "--verbose") as training:
        while not list((site / "long" / "checkpoints").glob("checkpoint-*")):
            assert training.is_running, training.stderr
        training.terminate()
        assert training.wait() == 0, training.stderr
        assert "stopping after this step" in training.stderr
        assert "--resume" in "".join(training.read_rest())
    steps = json.loads((site / "long" / "results.json").read_text())["steps"]
    settings["trainer"]["max_steps"] = steps + 3
    write(long, **{**settings, "out": "long"})
    again = commands.run(TRAIN, long, "--resume", "--json")
    assert again.code == 0, again.err
    assert again.json["steps"] == steps + 3


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_split_training_is_training_in_one_place(
    site: Path, commands: Commands, transport: str
) -> None:
    """Text and M here, frozen layers there: the same losses, and the same adapter."""
    central = commands.run(TRAIN, site / "train.yaml", "--json")
    assert central.code == 0, central.err
    partition(site, commands, "--plan", site / "out" / "plan.yaml")
    settings = yaml.safe_load((site / "train.yaml").read_text())
    del settings["model"], settings["method"]
    listen = "tcp://127.0.0.1:0" if transport == "tcp" else f"shm://privatelora-{site.name}"
    with deployed(site, training={}, listen=listen):
        split_file = write(
            site / "split.yaml",
            **{**settings, "out": "split", "mode": "split", "edge": "edge.yaml"},
        )
        split = commands.run(TRAIN, split_file, "--json")
    assert split.code == 0, split.err
    ours, theirs = ([e["loss"] for e in r.json["log"] if "loss" in e] for r in (split, central))
    assert len(ours) == 12
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert split.json["after"]["facts"] == central.json["after"]["facts"]
