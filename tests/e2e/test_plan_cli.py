"""``privatelora plan`` and ``privatelora-bench predict``, as commands. No figure is a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import BENCH, MAIN, SERVE, Commands, Process
from tests.partition.tiny import save_tiny

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    directory = tmp_path_factory.mktemp("plan")
    return tiny_deployment("llama", directory, rank_up=8, rank_down=4, every=2, targets="q,v")[0]


@pytest.fixture(scope="module")
def cloud(deployment: Deployment) -> Iterator[str]:
    with Process(SERVE, deployment.cloud_yaml()) as process:
        yield process.read_ready()


def planned(commands: Commands, *arguments: object) -> dict[str, Any]:
    found = commands.run(MAIN, "plan", *arguments, "--json")
    assert found.code == 0, found.err
    content: dict[str, Any] = json.loads(found.out)
    assert "An adapter belongs to the arrangement it was trained in" in content["notes"][0]
    assert content["recommended"] in content["options"]
    assert all(option["tokens_per_s"] > 0 for option in content["options"])
    return content


def test_the_papers_table(commands: Commands, tmp_path: Path) -> None:
    files = tmp_path / "paper.json", tmp_path / "paper.png"
    found = commands.run(BENCH, "predict", "--json", files[0], "--plot", files[1])
    assert found.code == 0, found.err
    for said in ("27.1", "20.5", "12.9", "37.2", "It is an input"):
        assert said in found.out
    content = json.loads(files[0].read_text())
    assert {row["model"] for row in content["rows"]} == {"7B", "13B", "30B"}
    assert content["assumptions"]
    assert files[1].read_bytes().startswith(PNG)


def test_predictions_for_data_sheets(commands: Commands, tmp_path: Path) -> None:
    model = save_tiny("qwen2", tmp_path / "model")
    files = tmp_path / "result.json", tmp_path / "result.png"
    for name, checkpoint in (("7b", "llama-2-7b"), (str(model), str(model))):
        found = commands.run(
            BENCH,
            *("predict", "--model", name, "--every", "1,2,all", "--codecs", "fp16,default"),
            *("--link", "20ms,60/100mbps", "--link", "1ms", "--sessions", "1,8"),
            *("--cloud", "h100-80g", "--edge", "iphone-13-pro-max"),
            *("--json", files[0], "--plot", files[1]),
        )
        assert found.code == 0, found.err
        content = json.loads(files[0].read_text())
        assert content["model"] == checkpoint
        assert content["cloud"]["name"] == "h100-80g"
        assert len(content["rows"]) == 3 * 2 * 2 * 2
        trips = {row["arrangement"]: row["round_trips_per_token"] for row in content["rows"]}
        assert trips["every 1"] == 2 * trips["every 2"]
        assert trips["every all"] == 1
        assert files[1].read_bytes().startswith(PNG)


def test_predictions_for_this_machine(commands: Commands, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", hidden_size=256)
    file = tmp_path / "result.json"
    found = commands.run(BENCH, "predict", "--model", model, "--every", "1,all", "--json", file)
    assert found.code == 0, found.err
    content = json.loads(file.read_text())
    assert content["machine"]["num_cpus"] >= 1
    measured = content["calibration"]["measured_ms"]
    assert min(measured.values()) > 0
    assert 0 <= content["calibration"]["emulation_ms"] < measured["emulated_token"]
    assert 0 <= content["cloud"]["exchange_wake_us"] < 1e3 * measured["far_token"]
    for handling, token in (("step_us", "grouped_token"), ("exchange_us", "split_token")):
        both = content["cloud"][handling] + content["edge"][handling]
        assert 0 <= both < 1e3 * measured[token]
    assert content["cloud"]["name"] == content["edge"]["name"] == "here"
    assert content["cloud"]["memory_gb_per_s"] > 0


def test_a_link_by_its_name(commands: Commands, tmp_path: Path) -> None:
    content = planned(commands, "--link", "20ms,60/100mbps", "--model", "7b")
    assert [option["every"] for option in content["options"]] == [1, 1, 2, 2, 6, 6, 15, 15, 32, 32]
    assert content["link"] == {"rtt_ms": 20, "up_mbps": 60, "down_mbps": 100}
    assert content["recommended"]["arrangement"] == "every all"
    assert "a100-80g and iphone-13-pro-max as in data sheets" in content["notes"][-1]
    found = commands.run(MAIN, "plan", "--link", "20ms,60/100mbps", "--model", "7b")
    assert found.code == 0, found.err
    assert "recommended: --every all, payload default, tls://" in found.out
    assert "for your next training" in " ".join(found.out.split())
    model = save_tiny("llama", tmp_path / "model")
    content = planned(
        commands,
        *("--link", "0ms", "--model", model, "--rank-up", 8, "--rank-down", 4),
        *("--cloud", "here", "--edge", "iphone-13-pro-max"),
    )
    assert [option["every"] for option in content["options"]] == [1, 1, 2, 2, 4, 4]
    assert content["calibration"]["model"] == str(model)


def test_the_link_of_an_edge(commands: Commands, deployment: Deployment, cloud: str) -> None:
    content = planned(commands, deployment.edge_yaml(cloud, "near.yaml"))
    assert content["every_now"] == 2
    assert content["measured"]["token_ms"] > 0
    assert {option["every"] for option in content["options"]} == {1, 2, 4}
    # One machine: whatever else, there is no network to encrypt for.
    assert content["recommended"]["transport"] == "shm://"
    half = {"delay_ms": 15, "bandwidth_mbps": 20}
    file = deployment.edge_yaml(cloud, "far.yaml", impaired={"up": half, "down": half})
    content = planned(commands, file)
    assert 25 < content["link"]["rtt_ms"] < 5000
    assert content["recommended"]["transport"] == "tls://"
    assert content["recommended"]["round_trips_per_token"] == 1
    found = commands.run(MAIN, "plan", file)
    assert found.code == 0, found.err
    assert "arrangement as now" in found.out
    assert "tokens/s with every 2" in found.out


def test_what_makes_no_sense(commands: Commands, deployment: Deployment, tmp_path: Path) -> None:
    link = ("--link", "20ms")
    nobody = deployment.edge_yaml("tcp://127.0.0.1:9", "nobody.yaml", connect_timeout_s=1)
    unsplit = deployment.edge_yaml("tcp://127.0.0.1:9", "unsplit.yaml", shard="nowhere")
    model = save_tiny("llama", tmp_path / "model")
    for program, arguments, said in (
        (MAIN, ("plan",), "give the YAML file of an edge, whose link is measured, or a link"),
        (
            MAIN,
            ("plan", nobody, *link),
            "give the YAML file of an edge, whose link is measured, or",
        ),
        (MAIN, ("plan", nobody, "--model", "7b"), "go with --link"),
        (MAIN, ("plan", nobody), "without a cloud, name the link: --link 20ms,60/100mbps"),
        (MAIN, ("plan", unsplit), "nowhere"),
        (MAIN, ("plan", deployment.cloud_yaml("other.yaml")), "other.yaml"),
        (MAIN, ("plan", tmp_path / "none.yaml"), "cannot read"),
        (MAIN, ("plan", "--link", "quick", "--model", "7b"), "link 'quick': write a round trip"),
        (MAIN, ("plan", "--link", "1ms,0mbps", "--model", "7b"), "a bandwidth above 0"),
        (MAIN, ("plan", *link, "--model", "9b"), "9b does not exist"),
        (MAIN, ("plan", *link, "--model", "7b", "--rank-up", 9999), "rank_up 9999 is larger than"),
        (MAIN, ("plan", *link, "--model", "7b", "--cloud", "here"), "without weights"),
        (
            MAIN,
            ("plan", *link, "--model", "7b", "--edge", "abacus"),
            "--edge 'abacus': choose from",
        ),
        (
            BENCH,
            ("predict", "--model", "7b", "--device", "cuda"),
            "--device cuda is of a cloud that is measured here",
        ),
        (BENCH, ("predict", "--model", "7b", "--every", "0"), "--every '0': give numbers from 1"),
        (BENCH, ("predict", "--model", "7b", "--every", ""), "--every '': give numbers from 1"),
        (BENCH, ("predict", "--model", "7b", "--codecs", "int3"), "--codecs 'int3': choose from"),
        (
            BENCH,
            ("predict", "--model", "7b", "--sessions", "0"),
            "--sessions '0': give numbers from 1",
        ),
        (
            BENCH,
            ("predict", "--model", "7b", "--sessions", "nan"),
            "--sessions 'nan': give numbers",
        ),
        (
            BENCH,
            ("predict", "--model", model, "--cloud", "abacus"),
            "--cloud 'abacus': choose from",
        ),
        (BENCH, ("predict", "--model", tmp_path / "none", *link), "does not exist"),
        (BENCH, ("predict", "--plot", "plot.jpg"), "choose a name that ends in .png"),
        (BENCH, ("predict", "--json", tmp_path), "cannot write"),
    ):
        found = commands.run(program, *arguments)
        assert (found.code, found.out) == (1, ""), arguments
        assert found.err.startswith("error: "), found.err
        assert said in found.err
        assert found.err.count("\n") == 1
