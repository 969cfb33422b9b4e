"""The benchmarks, small: what they write is complete and makes sense. No figure is a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.e2e.processes import BENCH, Commands
from tests.partition.tiny import save_tiny

PNG = b"\x89PNG"


def result(commands: Commands, directory: Path, *arguments: object) -> dict[str, Any]:
    """What a benchmark wrote to its JSON file; its table must have been shown."""
    file = directory / "results" / "result.json"
    found = commands.run(BENCH, *arguments, "--json", file)
    assert found.code == 0, found.err
    assert "│" in found.out
    content: dict[str, Any] = json.loads(file.read_text())
    assert content["machine"]["num_cpus"] >= 1
    return content


def test_transport(commands: Commands, tmp_path: Path) -> None:
    arguments = ("--rounds", 1, "--round-trips", 100, "--plot", tmp_path / "plot.png")
    content = result(commands, tmp_path, "transport", *arguments)
    assert content["unavailable"] == {}
    rows = {row["transport"]: row for row in content["rows"]}
    ours = {"tcp", "tls", "zmq+tcp", "zmq+tcp curve", "zmq+ipc", "shm"}
    assert set(rows) == ours | {"bare uvloop", "bare pyzmq"}
    for name, row in rows.items():
        assert 0 < row["rtt_us_p50"] <= row["rtt_us_p99"]
        assert row["large_mib_per_s"] > 0
        if name in ours:
            bare = rows[row["bare"]]["rtt_us_p50"]
            assert abs(row["vs_bare_p50"] - row["rtt_us_p50"] / bare) < 1e-9
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_quality(commands: Commands, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("She sells apples. The weather in the mountains is fine. " * 10)
    content = result(
        commands,
        tmp_path,
        "quality",
        *("--model", model, "--rank", 8, "--text", text, "--sequences", 2, "--tokens", 48),
        *("--codecs", "fp16,int8,int4,fp16+lz4", "--by-kind", "--plot", tmp_path / "plot.png"),
    )
    rows = {(row["codec"], row["direction"]): row for row in content["rows"]}
    assert len(rows) == 2 + 4 * 7
    exact = rows["fp32", "both"]
    assert (exact["kl"], exact["top1_agreement"], exact["positions"]) == (0, 1, 96)
    codecs = ("fp32", "fp16", "int8", "int4")
    nbytes = [rows[codec, "both"]["bytes_per_token"] for codec in codecs]
    assert nbytes == sorted(nbytes, reverse=True)
    kls = [rows[codec, "both"]["kl"] for codec in codecs]
    assert kls == sorted(kls)
    assert content["base_model"]["kl"] > 0
    assert rows["fp16+lz4", "both"]["kl"] == rows["fp16", "both"]["kl"]
    assert rows["fp16+lz4", "both"]["bytes_per_token"] <= nbytes[1]
    for direction in ("up", "down"):
        one_way = rows["int8", direction]["bytes_per_token"]
        assert nbytes[2] < one_way < nbytes[0]
    assert exact["7b"]["per layer, rank 128"]["payload_nbytes"] == 4 * 32384
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_emulator(commands: Commands, tmp_path: Path) -> None:
    content = result(commands, tmp_path, "emulator", "--rtt-ms", "1", "--mbps", "10")
    [rtt] = content["rtt_rows"]
    assert rtt["set_rtt_ms"] == 1
    assert rtt["rtt_ms_p50"] >= 1
    up, down = content["bandwidth_rows"]
    assert (up["direction"], down["direction"]) == ("up", "down")
    assert 0 < up["mbps"] < 11


def test_emulator_beside_the_kernel(commands: Commands, tmp_path: Path) -> None:
    """Not every system lets us shape links; what it does not is named."""
    before = namespaces()
    arguments = ("--kernel", "--rtt-ms", "2", "--mbps", "20")
    content = result(commands, tmp_path, "emulator", *arguments)
    for name, rows, figure in (
        ("round trips", "kernel_rtt_rows", "kernel_rtt_ms"),
        ("bandwidth", "kernel_bandwidth_rows", "kernel_mbps"),
    ):
        if name in content["missing"]:
            assert content["missing"][name]
            assert content[rows] == []
        else:
            [row] = content[rows]
            assert row[figure] > 0
    assert namespaces() == before


def namespaces() -> set[str]:
    """Network namespaces with names."""
    place = Path("/run/netns")
    return {path.name for path in place.iterdir()} if place.is_dir() else set()


def test_scheduling(commands: Commands, tmp_path: Path) -> None:
    arguments = ("--sessions", "1,4", "--rtt-ms", "5", "--segments", 3, "--tokens", 6)
    content = result(commands, tmp_path, "scheduling", *arguments)
    policies = {"laggards_first", "fullest", "oldest", "whole steps", "lockstep"}
    rows = {(row["sessions"], row["policy"]): row for row in content["rows"]}
    assert set(rows) == {(sessions, policy) for sessions in (1, 4) for policy in policies}
    for row in rows.values():
        assert row["rtt_ms"] == 5
        assert row["time_per_token_ms_p50"] <= row["time_per_token_ms_p99"]
        assert 0 < row["fairness"] <= 1 + 1e-9
        ratio = row["aggregate_tokens_per_s"] / row["roofline_tokens_per_s"]
        assert abs(row["vs_roofline"] - ratio) < 1e-9
    assert {row["policy"] for row in content["situations"]} == policies - {"lockstep"}
    assert all(row["us_per_step"] > 0 for row in content["cost_rows"])


def test_serve_compares_schedulings(commands: Commands, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", hidden_size=256)
    content = result(
        commands,
        tmp_path,
        "serve",
        *("--model", model, "--dtype", "float32", "--prompt-tokens", 4, "--tokens", 16),
        *("--sessions", 2, "--rtt-ms", 0, "--edges", 1),
        *("--compare", "--plot", tmp_path / "plot.png"),
    )
    rows = {(row["sessions"], row["scheduling"]): row for row in content["rows"]}
    ways = ("ours", "lockstep", "whole steps")
    assert set(rows) == {(sessions, way) for sessions in (1, 2) for way in ways}
    for (sessions, _), row in rows.items():
        assert row["rtt_ms"] == 0
        assert 0 < row["time_per_token_ms_p50"] <= row["time_per_token_ms_p99"]
        assert row["roofline_tokens_per_s"] <= rows[sessions, "ours"]["aggregate_tokens_per_s"]
        ratio = row["aggregate_tokens_per_s"] / row["roofline_tokens_per_s"]
        assert abs(row["vs_roofline"] - ratio) < 1e-9
    assert content["round_trips_per_token"] == 4
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_http(commands: Commands, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", hidden_size=256)
    arguments = ("--model", model, "--rounds", 2, "--tokens", 12, "--rtt-ms", "0")
    content = result(commands, tmp_path, "http", *arguments)
    [row] = content["rows"]
    runs = {name: row[name]["tokens_per_s"]["runs"] for name in ("direct", "http")}
    assert [len(rates) for rates in runs.values()] == [2, 2]
    ratios = sorted(a / b for a, b in zip(runs["http"], runs["direct"], strict=True))
    assert [row["ratio"]["min"], row["ratio"]["max"]] == ratios


def test_options_that_make_no_sense(commands: Commands, tmp_path: Path) -> None:
    for arguments, said in (
        (("transport", "--transports", "pigeon"), "no transport 'pigeon' to measure; choose from"),
        (("transport", "--plot", "plot.jpg"), "choose a name that ends in .png"),
        (("quality", "--codecs", "int3"), "--codecs 'int3': choose from fp32, fp16"),
        (("scheduling", "--sessions", "0"), "--sessions 0: give numbers from 1"),
        (("emulator", "--mbps", "fast"), "--mbps 'fast': give numbers, such as 1,20"),
        (("emulator", "--mbps", "-5"), "bandwidth_mbps must be at least"),
        (("load", "--attacks", "abandoned"), "no attack 'abandoned' on tcp://; choose from"),
        (("training", "--rows", "lora"), "--rows: there is no row 'lora'; choose from full, lora-"),
        (("training", "--rtt-ms", "-5"), "--rtt-ms -5: half of it each way: delay_ms must be"),
        (("training", "--tokens", "9000"), "--tokens 9000: the model's context is 8192"),
    ):
        found = commands.run(BENCH, *arguments)
        assert (found.code, found.out) == (1, "")
        assert found.err.startswith("error: ")
        assert said in found.err
        assert found.err.count("\n") == 1


def test_turns(commands: Commands, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", hidden_size=256, max_position_embeddings=2048)
    content = result(
        commands,
        tmp_path,
        *("turns", "--model", model, "--history-tokens", 200, "--rounds", 2),
        *("--rtt-ms", "0,2", "--dtype", "float32"),
    )
    assert [row["rtt_ms"] for row in content["rows"]] == [0, 2]
    for row in content["rows"]:
        cold, second = row["cold_start"], row["second_turn"]
        assert abs(second["prompt_tokens"] - cold["prompt_tokens"]) < 5
        assert cold["tokens_run"] == cold["prompt_tokens"]
        assert 0 < second["tokens_run"] < cold["tokens_run"] / 3
        assert 0 < second["bytes_to_cloud"] < cold["bytes_to_cloud"] / 3
        assert row["speedup"]["min"] <= row["speedup"]["median"] <= row["speedup"]["max"]


@pytest.mark.parametrize(
    ("transport", "attacks"), [("tcp", "dropped,idle,slow,unread"), ("tls", "abandoned,idle")]
)
def test_load(commands: Commands, tmp_path: Path, transport: str, attacks: str) -> None:
    model = save_tiny("llama", tmp_path / "model", hidden_size=256)
    content = result(
        commands,
        tmp_path,
        *("load", "--model", model, "--dtype", "float32", "--transport", transport),
        *("--attacks", attacks),
        *("--sessions", 2, "--rounds", 1, "--seconds", 0.5, "--rate", 100),
        *("--idle", 8, "--slow", 6, "--plot", tmp_path / "plot.png"),
    )
    rows = {row["attack"]: row for row in content["rows"]}
    assert list(rows) == [*attacks.split(","), "all"]
    for row in rows.values():
        [found] = row["rounds"]
        rates = {phase: found[phase]["tokens_per_s"] for phase in ("quiet", "attack", "control")}
        assert min(rates.values()) > 0
        assert abs(row["vs_quiet"]["median"] - rates["attack"] / rates["quiet"]) < 1e-9
        assert abs(row["vs_control"]["median"] - rates["attack"] / rates["control"]) < 1e-9
        assert found["control"]["connections"]["opened"] > 0
    held = {"idle": 8, "slow": 6, "unread": 6}
    held["all"] = sum(number for name, number in held.items() if name in rows)
    for name in rows.keys() & held.keys():
        number = held[name]
        assert rows[name]["connections"]["opened"] >= number
        assert (
            rows[name]["cloud_descriptors_peak"] >= content["cloud_before"]["descriptors"] + number
        )
    assert content["cloud_after"]["descriptors"] == content["cloud_before"]["descriptors"]
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_training(commands: Commands, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    content = result(
        commands,
        tmp_path,
        *("training", "--model", model, "--rows", "grouped,split-grouped", "--every", 2),
        *("--grouped-rank", 4, "--batch-size", 2, "--tokens", 8, "--rounds", 2, "--steps", 3),
        *("--num-threads", 1, "--plot", tmp_path / "plot.png"),
    )
    central, split = content["rows"]
    assert content["baseline"] == central["method"] == split["method"]
    assert [central["mode"], central["rtt_ms"]] == ["central", None]
    assert [split["mode"], split["rtt_ms"]] == ["split", 0]
    for row in content["rows"]:
        assert row["trainable_parameters"] == 4 * 3 * 4 * 4
        assert 0 < row["tokens_per_s"]["min"] <= row["tokens_per_s"]["max"]
        ratios = [
            ours / theirs
            for ours, theirs in zip(
                row["tokens_per_s"]["runs"], central["tokens_per_s"]["runs"], strict=True
            )
        ]
        assert [row["ratio"]["min"], row["ratio"]["max"]] == sorted(ratios)
    # The same batches and the same M: else it would not be the same training that is compared.
    assert split["loss"] == pytest.approx(central["loss"], rel=1e-4)
    assert [central["round_trips_per_step"], split["round_trips_per_step"]] == [0, 4]
    assert central["bytes_per_step"] == {"up": 0, "down": 0}
    # Hidden states there and back, and once more for their gradients.
    assert min(split["bytes_per_step"].values()) > 2 * 8 * 64 * 4
    assert central["peak_memory_mib"].keys() == {"trainer"}
    assert split["peak_memory_mib"].keys() == {"trainer", "cloud"}
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_sweep(commands: Commands, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    settings = {
        "model": str(save_tiny("llama", tmp_path / "model", hidden_size=256)),
        "out": "measured",
        "dtype": "float32",
        "links": {"near": "0ms", "far": "4ms,20/40mbps"},
        "arrangements": {"per layer": {"rank_up": 8, "rank_down": 8}},
        "payloads": {"fp16": "fp16"},
        "sessions": [1, 2],
        "baselines": ["transformers-cloud", "published"],
        "rounds": 1,
        "tokens": 8,
    }
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    content = result(commands, tmp_path, "sweep", file, "--plot", tmp_path / "plot.png")
    rows = {(row.get("link"), row.get("baseline"), row["sessions"]): row for row in content["rows"]}
    links = ("near", "far")
    ours = {(link, None, sessions) for link in links for sessions in (1, 2)}
    others = {(link, "published", 1) for link in links} | {(None, "transformers-cloud", 1)}
    assert set(rows) == ours | others
    for key, row in rows.items():
        assert row["rounds"] == 1
        assert 0 < row["tokens_per_s"]["min"] <= row["tokens_per_s"]["max"]
        if key in ours:
            ratio = row["predicted_vs_measured"]
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    # 4 layers and the way back, at 4 ms each.
    for key in (("far", None, 1), ("far", "published", 1)):
        assert rows[key]["tokens_per_s"]["max"] < 1 / (4 * 4e-3)
    assert content["missing"] == {}
    assert content["prediction"]["cases"] == len(ours)
    assert content["method"].startswith("For every arrangement")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)

    # What was measured is not measured again, wherever a run was cut off.
    kept = tmp_path / "measured" / "measured.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    again = result(commands, tmp_path, "sweep", file)
    assert (kept.read_text().splitlines(keepends=True), again["rows"]) == (lines, content["rows"])
    kept.write_text("".join(lines[:-1]) + lines[-1][:20])
    resumed = result(commands, tmp_path, "sweep", file)
    assert [row["rounds"] for row in resumed["rows"]] == [1] * len(rows)
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(content))
    second.write_text(json.dumps(resumed))
    compared = commands.run(BENCH, "compare", first, second, "--json").json
    assert compared["figures"] >= 2 * len(rows)
    shown = commands.run(BENCH, "compare", first, second)
    assert "figures in both" in shown.out

    file.write_text(yaml.safe_dump({**settings, "dtype": "bfloat16"}, sort_keys=False))
    refused = commands.run(BENCH, "sweep", file)
    assert refused.code == 1
    assert "holds measurements with other settings (dtype)" in refused.err


def test_a_baseline_that_is_not_installed_is_missing(commands: Commands, tmp_path: Path) -> None:
    """With a model that was made for it."""
    file = tmp_path / "sweep.yaml"
    shape = save_tiny("llama", tmp_path / "shape", hidden_size=256, vocab_size=300, tokenizer=False)
    made = commands.run(BENCH, "random-model", shape / "config.json", tmp_path / "model")
    assert made.code == 0, made.err
    assert "billion random weights in bfloat16" in made.out
    settings = {
        "model": str(tmp_path / "model"),
        "out": "measured",
        "links": {"near": "0ms"},
        "arrangements": {"grouped": {"every": 2, "rank_up": 8, "rank_down": 8}},
        "transports": ["shm"],
        "baselines": ["transformers", "llama.cpp"],
        "rounds": 1,
        "tokens": 8,
    }
    file.write_text(yaml.safe_dump(settings))
    content = result(commands, tmp_path, "sweep", file)
    assert [row.get("baseline") for row in content["rows"]] == ["transformers", None]
    assert all(row["tokens_per_s"]["min"] > 0 for row in content["rows"])
    [reason] = content["missing"].values()
    assert content["missing"].keys() == {"llama.cpp"}
    assert "llama" in reason


def sweep_on(device: str, directory: Path) -> Path:
    """A small sweep with clouds on ``device``."""
    file = directory / "sweep.yaml"
    settings = {
        "model": str(save_tiny("llama", directory / "model", hidden_size=256)),
        "out": "measured",
        "device": device,
        "links": {"near": "0ms"},
        "arrangements": {"grouped": {"every": 2, "rank_up": 8, "rank_down": 8}},
        "baselines": ["transformers-cloud", "text"],
        "rounds": 1,
        "tokens": 8,
    }
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cloud_on_a_gpu(commands: Commands, tmp_path: Path) -> None:
    content = result(commands, tmp_path, "sweep", sweep_on("cuda", tmp_path))
    found = [row.get("baseline") for row in content["rows"]]
    assert found == ["transformers-cloud", None, "text"]
    assert all(row["tokens_per_s"]["min"] > 0 for row in content["rows"])
    served = result(
        commands,
        tmp_path,
        *("serve", "--model", tmp_path / "model", "--device", "cuda", "--sessions", 2),
        *("--rtt-ms", 0, "--prompt-tokens", 4, "--tokens", 16, "--edges", 1),
    )
    assert served["settings"]["device"] == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there(commands: Commands, tmp_path: Path) -> None:
    refused = "error: device cuda: no CUDA device is available here; use cpu"
    model = ("--model", tmp_path / "model", "--device", "cuda")
    for arguments in (
        ("sweep", sweep_on("cuda", tmp_path)),
        ("serve", *model),
        ("predict", *model),
    ):
        found = commands.run(BENCH, *arguments)
        assert (found.code, found.err.strip()) == (1, refused)


def test_profile(commands: Commands, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", hidden_size=256)
    content = result(
        commands,
        tmp_path,
        *("profile", "--model", model, "--dtype", "float32", "--rtt-ms", "0,10"),
        *("--prompt-tokens", 4, "--tokens", 12, "--plot", tmp_path / "plot.png"),
    )
    near, far = content["rows"]
    assert content["round_trips_per_token"] == 4
    for row in content["rows"]:
        assert row["num_tokens"] == 12 - 5
        assert all(part >= 0 for part in row["parts_ms"].values())
        assert row["parts_ms"]["cloud: layers"] > 0
        assert row["parts_ms"]["edge: LM head"] > 0
        assert row["example"]["edge"]
        assert row["example"]["cloud"]
    # The network is what was added, hardly anything else.
    added = far["parts_ms"]["network"] - near["parts_ms"]["network"]
    assert added > 0.5 * 4 * 10
    assert far["token_ms"] >= 4 * 10
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_the_schema_of_results(commands: Commands) -> None:
    shown = commands.run(BENCH, "schema")
    assert {"benchmark", "machine", "settings", "rows"} <= json.loads(shown.out)[
        "properties"
    ].keys()
