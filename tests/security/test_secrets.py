"""Secrets stay where they are: in no log, answer, list of processes, metric, trace or repr.

The environment of a process can be read by its own user, in /proc/PID/environ: who keeps a token
in a variable shows it to every program of that user. A file can be kept from them.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from privatelora.runtime.client_tokens import digest, new_token, token_to_send
from privatelora.runtime.config import load_cloud_config, load_edge_config
from privatelora.transports.tls_keys import new_certificate
from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import EDGE, MAIN, PATIENCE_S, SERVE, Commands, Process

TOKEN, WRONG_TOKEN, KEY, WRONG_KEY, SPARE = (new_token() for _ in range(5))
SECRETS = {
    "token": TOKEN,
    "wrong token": WRONG_TOKEN,
    "API key": KEY,
    "wrong API key": WRONG_KEY,
    "token in a variable": SPARE,
}
QUESTION = {"messages": [{"role": "user", "content": "How many apples?"}], "max_tokens": 4}


class Place:
    """A deployment with all its secrets, and everything that anybody was shown."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.shown: dict[str, str] = {}
        directory = deployment.directory
        for name, secret in (
            ("token", TOKEN),
            ("wrong-token", WRONG_TOKEN),
            ("api-key", KEY),
            ("wrong-api-key", WRONG_KEY),
        ):
            path = directory / name
            path.touch(0o600)
            path.write_text(secret + "\n")
        (directory / "tokens.yaml").write_text(f"alice: {digest(TOKEN)}\nbob: {digest(SPARE)}\n")
        (directory / "bad-tokens.yaml").write_text(f"alice: {TOKEN}\n")
        new_certificate(
            directory / "cloud.key", directory / "cloud.crt", "cloud", ("127.0.0.1",), days=1
        )

    def cloud_yaml(self, name: str = "cloud.yaml", **settings: object) -> Path:
        usual = {
            "listen": "tls://127.0.0.1:0",
            "tls": {"certificate": "cloud.crt", "key": "cloud.key"},
            "tokens": "tokens.yaml",
            "metrics": "127.0.0.1:0",
            "trace": "trace.json",
        }
        return self.deployment.cloud_yaml(name, **{**usual, **settings})

    def edge_yaml(self, address: str, name: str = "edge.yaml", **settings: object) -> Path:
        usual = {
            "token": {"file": "token"},
            "tls": {"trust": "cloud.crt"},
            "http": {"listen": "127.0.0.1:0", "api_key": {"file": "api-key"}},
        }
        return self.deployment.edge_yaml(address, name, **{**usual, **settings})

    def keep(self, what: str, text: str) -> None:
        """Something that was shown."""
        assert text, f"{what} shows nothing, so this test would prove nothing"
        self.shown[what] = text

    def keep_process(self, what: str, process: Process) -> None:
        self.keep(f"{what}: list of processes", Path(f"/proc/{process.pid}/cmdline").read_text())


def asked(url: str, key: str | None = None, body: object = None) -> str:
    """Status, header and body of an answer."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return f"{answer.status} {answer.headers} {answer.read().decode()}"
    except urllib.error.HTTPError as refusal:
        with refusal:
            return f"{refusal.code} {refusal.headers} {refusal.read().decode()}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """After a life with success and with every kind of refusal."""
    directory = tmp_path_factory.mktemp("secrets")
    deployment, _ = tiny_deployment("llama", directory, rank_up=8, rank_down=8)
    place = Place(deployment)
    logs = ["--verbose", "--log-format", "text"]
    with Process(
        SERVE, place.cloud_yaml(), "--verbose", "--log-format", "json", is_fresh=True
    ) as cloud:
        address = cloud.read_ready()
        found = re.search(r"http://127\.0\.0\.1:\d+/metrics", cloud.stderr)
        assert found is not None
        in_variable = place.edge_yaml(
            address, "variable.yaml", token={"env": "A_TOKEN"}, http={"listen": "127.0.0.1:0"}
        )
        with (
            Process(EDGE, place.edge_yaml(address), *logs, is_fresh=True) as edge,
            Process(EDGE, in_variable, *logs, environment={"A_TOKEN": SPARE}) as other,
        ):
            url = edge.read_ready()
            other.read_ready()
            for name, process in (("cloud", cloud), ("edge", edge), ("other edge", other)):
                place.keep_process(name, process)
            chat = f"{url}/v1/chat/completions"
            good = asked(chat, KEY, QUESTION)
            assert good.startswith("200")
            place.keep("answer", good)
            place.keep("wrong key", asked(chat, WRONG_KEY, QUESTION))
            place.keep("nowhere", asked(f"{url}/nowhere", KEY))
            place.keep("bad request", asked(chat, KEY, {"messages": 1}))
            place.keep("status of the edge", asked(f"{url}/v1/privatelora/status", KEY))
            place.keep("page", asked(f"{url}/"))
            place.keep("metrics", asked(found[0]))
            wrong = place.edge_yaml(address, "wrong.yaml", token={"file": "wrong-token"})
            with Process(EDGE, wrong, *logs) as refused:
                assert refused.wait() == 1
                place.keep("refused edge", refused.stderr)
            edge.terminate()
            other.terminate()
            assert (edge.wait(), other.wait()) == (0, 0)
            place.keep("log of the edge", edge.stderr)
        cloud.terminate()
        assert cloud.wait() == 0
        place.keep("log of the cloud", cloud.stderr)
    place.keep("trace", (deployment.directory / "trace.json").read_text())
    return place


@pytest.fixture(scope="module")
def commands() -> Commands:
    return Commands()


def assert_no_secret(what: str, text: str) -> None:
    for name, secret in SECRETS.items():
        assert secret not in text, f"{what} shows the {name}"
        assert secret[:12] not in text, f"{what} shows a part of the {name}"


def test_nothing_that_daemons_show(place: Place) -> None:
    key = (place.deployment.directory / "cloud.key").read_text()
    key_lines = [line for line in key.splitlines() if not line.startswith("-")]
    assert "joined as token:alice" in place.shown["log of the cloud"]
    assert "does not know the token" in place.shown["refused edge"]
    for what, text in place.shown.items():
        assert_no_secret(what, text)
        assert not any(line in text for line in key_lines), what


def test_nothing_that_commands_show(place: Place, commands: Commands) -> None:
    address = "tls://127.0.0.1:1"
    name = place.deployment.directory / "not-a-key"
    name.write_text(TOKEN)  # what stands there is not what belongs there
    in_settings = place.deployment.directory / "in-settings.yaml"
    in_settings.write_text(f"cloud: {address}\nshard: edge\ntoken: {TOKEN}\n")
    broken = place.deployment.directory / "broken.yaml"
    broken.write_text(f"cloud: {address}\ntoken: {{file: token}}\nhttp: {{api_key: '{KEY}\n")
    cut = {"tls": {"certificate": "cloud.crt", "key": "not-a-key"}}
    runs: list[tuple[str, list[object]]] = [
        (MAIN, ["config", "check", place.cloud_yaml("check.yaml")]),
        (MAIN, ["config", "check", place.edge_yaml(address, "check-edge.yaml")]),
        (MAIN, ["config", "check", place.cloud_yaml("bad.yaml", tokens="bad-tokens.yaml")]),
        (MAIN, ["config", "check", in_settings]),
        (MAIN, ["config", "check", broken]),
        (MAIN, ["status", place.edge_yaml(address, "status.yaml")]),
        (SERVE, [place.cloud_yaml("bad.yaml", tokens="bad-tokens.yaml"), "--verbose"]),
        (SERVE, [place.cloud_yaml("cut.yaml", **cut), "--verbose"]),
        (EDGE, [in_settings, "--verbose"]),
        (EDGE, [place.edge_yaml("tcp://192.0.2.7:1", "clear.yaml"), "--verbose"]),
        (EDGE, [place.edge_yaml(address, "nobody.yaml"), "--verbose"]),
    ]
    for module, arguments in runs:
        result = commands.run(module, *arguments)
        assert result.out + result.err
        assert_no_secret(f"{module} {arguments}", result.out + result.err)


def test_nothing_that_a_repr_shows(place: Place) -> None:
    edge_file = place.edge_yaml("tls://127.0.0.1:1", "repr.yaml")
    edge, cloud = load_edge_config(edge_file), load_cloud_config(place.cloud_yaml("repr-c.yaml"))
    assert edge.token is not None
    assert edge.http.api_key is not None
    token = token_to_send(edge.token, edge.cloud, with_curve=False)
    assert token.get_secret_value() == TOKEN
    values = (edge, cloud, token, edge.http.api_key.read(), edge.credentials())
    for value in values:
        assert_no_secret("a repr", f"{value!r} {value}")
    assert_no_secret("a dump", edge.model_dump_json())
