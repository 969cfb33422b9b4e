"""What is in deploy/, as far as it can be tried without a service manager and an engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from privatelora.runtime.config import CloudConfig, load_edge_config
from tests.e2e.deployment import tiny_deployment
from tests.e2e.processes import EDGE, PATIENCE_S, SERVE, Commands, Process

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
MODULES = {"privatelora-serve": SERVE, "privatelora-edge": EDGE}
DRAIN_TIMEOUT_S = CloudConfig.model_fields["drain_timeout_s"].default
README = (DEPLOY / "README.md").read_text()


# systemd

UNITS = {
    "privatelora-cloud.service": ("/opt/privatelora", "--system"),
    "privatelora-edge.service": ("%h/.local/share/privatelora", "--user"),
}


def unit(name: str) -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys are as written
    parser.read(DEPLOY / "systemd" / name)
    return parser


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_runs_what_there_is(name: str, commands: Commands) -> None:
    service = unit(name)["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    prefix, _ = UNITS[name]
    assert program.startswith(f"{prefix}/bin/")
    assert f"{prefix.replace('%h', '~')}/bin/pip install" in README
    *options, file = arguments
    assert f" {file.replace('%h', '~')}\n" in README
    accepted = commands.run(MODULES[Path(program).name], *options, "nowhere.yaml")
    assert accepted.err == "error: cannot read nowhere.yaml: No such file or directory\n"
    assert int(service["TimeoutStopSec"]) > DRAIN_TIMEOUT_S


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_a_unit(name: str, tmp_path: Path) -> None:
    prefix, whose = UNITS[name]
    text = (DEPLOY / "systemd" / name).read_text()
    path = tmp_path / name
    path.write_text(text.replace(f"{prefix}/bin", str(Path(sys.executable).parent)))
    done = subprocess.run(
        ["systemd-analyze", whose, "verify", str(path)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_commands_that_fit_settings_to_their_place(tmp_path: Path) -> None:
    shown = re.findall(r"^    (?:sudo )?(sed -i '[^']+') (\S+)", README, re.MULTILINE)
    assert len(shown) == 2
    for command, target in shown:
        side = Path(target).stem
        file = tmp_path / f"{side}.yaml"
        shutil.copy(ROOT / "configs" / f"{side}-internet.yaml", file)
        subprocess.run([*shlex.split(command), str(file)], check=True, timeout=PATIENCE_S)
        settings = file.read_text().partition("\nlisten:" if side == "cloud" else "\ncloud:")[2]
        assert "../" not in settings
        values = yaml.safe_load(file.read_text())
        expected = {"cloud": "/var/lib/privatelora/shard", "edge": "out/shards/edge"}[side]
        assert values["shard"] == expected
        assert values["tls"]["key"].startswith("keys/")


# Containers


def dockerfile() -> dict[str, list[list[str]]]:
    """Instructions by stage: words of each."""
    text = (DEPLOY / "container" / "Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, list[list[str]]] = {}
    current: list[list[str]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if words[0] == "FROM":
            current = stages[words[3]] = []
        current.append(words)
    return stages


def instruction(stage: str, name: str) -> list[str]:
    """The JSON list of the only such instruction in a stage."""
    (found,) = (words for words in dockerfile()[stage] if words[0] == name)
    text = " ".join(found)
    return list(json.loads(text[text.index("[") :]))


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text())


def test_an_image_is_made_of_what_there_is() -> None:
    stages = dockerfile()
    assert {*stages} == {"installed", "base", "cloud", "edge"}
    kept = (DEPLOY / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        source for words in stages["installed"] if words[0] == "COPY" for source in words[1:-1]
    ]
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in kept
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {*packages["package-dir"].values()} <= {*copied}
    assert ["USER", "10001"] in stages["base"]


@pytest.mark.parametrize("stage", ["cloud", "edge"])
def test_an_image_starts_a_daemon(stage: str, commands: Commands) -> None:
    program, *options = instruction(stage, "ENTRYPOINT")
    assert program in SCRIPTS
    accepted = commands.run(MODULES[program], *options, "nowhere.yaml")
    assert accepted.err == "error: cannot read nowhere.yaml: No such file or directory\n"
    service = compose()["services"][stage]
    assert service["build"]["target"] == stage
    (settings,) = instruction(stage, "CMD")
    assert f"./{stage}.yaml:{settings}:ro" in service["volumes"]


def test_what_is_mounted_is_made_before() -> None:
    document = compose()
    folder = DEPLOY / "container"
    for service in document["services"].values():
        assert (folder / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_TIMEOUT_S
        assert service["user"] != "0"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            made = source.removeprefix("../../").removesuffix("/cloud").removesuffix("/edge")
            assert (folder / source).is_file() or f" {made}" in README
    secret = document["secrets"]["api-key"]["file"].removeprefix("../../")
    assert f"> {secret})" in README


def test_the_settings_and_health_checks_of_the_images(tmp_path: Path) -> None:
    """The daemons as the containers have them, but for names and places of another machine."""
    deployment = tiny_deployment("llama", tmp_path, rank_up=8, rank_down=8)[0]
    key = deployment.directory / "api-key"
    key.write_text("the key")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
        metrics, http = one.getsockname()[1], other.getsockname()[1]
    elsewhere = {
        "/data/shards": str(deployment.directory),
        "/data": str(deployment.directory),
        "/run/secrets": str(deployment.directory),
        "0.0.0.0:18230": "127.0.0.1:0",
        ":9464": f":{metrics}",
        ":18231": f":{http}",
    }

    def settings(side: str, **more: str) -> Path:
        text = (DEPLOY / "container" / f"{side}.yaml").read_text()
        for old, new in {**elsewhere, **more}.items():
            text = text.replace(old, new)
        path = deployment.directory / f"{side}.yaml"
        path.write_text(text)
        return path

    def is_healthy(stage: str) -> bool:
        _, *arguments = instruction(stage, "HEALTHCHECK")
        for old, new in elsewhere.items():
            arguments = [argument.replace(old, new) for argument in arguments]
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, timeout=PATIENCE_S, check=False
        )
        return done.returncode == 0

    assert not is_healthy("cloud")
    with Process(SERVE, settings("cloud")) as cloud:
        address = cloud.read_ready()
        assert is_healthy("cloud")
        file = settings("edge", **{"tcp://cloud:18230": address})
        assert load_edge_config(file).http.api_key is not None
        assert not is_healthy("edge")
        with Process(EDGE, file) as edge:
            edge.read_ready()
            assert is_healthy("edge")
            for daemon in (edge, cloud):
                daemon.terminate()
                assert daemon.wait() == 0, daemon.stderr
