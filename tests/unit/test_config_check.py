"""``privatelora config check`` and ``config schema``: what they find in files, and do not tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from privatelora.cli.main import app
from privatelora.runtime.client_tokens import digest
from privatelora.runtime.config_check import MODELS, Report, check_file
from privatelora.runtime.payload.names import CODEC_NAMES
from privatelora.transports.curve_keys import new_curve_key
from privatelora.transports.tls_keys import new_certificate
from tests.e2e.deployment import Deployment, tiny_deployment

SECRET = "sk-never-to-be-shown"  # of this test alone
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    directory = tmp_path_factory.mktemp("check")
    made = tiny_deployment("llama", directory, rank_up=8, rank_down=8)[0]
    for name in ("cloud", "edge"):
        keys = made.directory / name
        new_certificate(keys / "tls.key", keys / "own.crt", name, ["cloud.example"], 100)
        new_curve_key(keys / "curve.key", keys / "own.pub")
    (made.directory / "tokens.yaml").write_text(f"alice: {digest('a token')}\n")
    return made


@pytest.fixture
def check(deployment: Deployment) -> Iterator[Callable[..., Report]]:
    """Checks a file of ``kind`` that differs from a good one; None leaves a key out."""
    path = deployment.directory / "checked.yaml"

    def check(kind: str, **changes: Any) -> Report:
        if kind == "cloud":
            usual: dict[str, Any] = {"listen": "tcp://127.0.0.1:18230", "shard": "cloud"}
        else:
            adapter = "adapter.safetensors"
            usual = {"cloud": "tcp://127.0.0.1:18230", "shard": "edge", "adapter": adapter}
        settings = {k: v for k, v in {**usual, **changes}.items() if v is not None}
        path.write_text(yaml.safe_dump(settings))
        report = check_file(path)
        assert report.kind == kind
        return report

    yield check
    path.unlink(missing_ok=True)


Check = Callable[..., Report]


@pytest.mark.parametrize("kind", ["cloud", "edge"])
def test_a_good_file_is_right(check: Check, kind: str) -> None:
    report = check(kind)
    assert report.is_right
    assert not report.findings.warnings


TLS = {"certificate": "cloud/own.crt", "key": "cloud/tls.key"}
CURVE = {"key": "cloud/curve.key", "trust": "edge/own.pub"}

WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "address": ("cloud", {"listen": "127.0.0.1:1"}, "listen", "must start with a scheme"),
    "scheme": ("edge", {"cloud": "quic://a:1"}, "cloud", "no transport serves quic://"),
    "wildcard": ("edge", {"cloud": "tcp://*:1"}, "cloud", "can only be listened on"),
    "name": ("cloud", {"listen": "shm://a:1"}, "listen", "expected a name and nothing else"),
    "shard": ("cloud", {"shard": "nowhere"}, "shard", "is not a shard"),
    "side": ("cloud", {"shard": "edge"}, "shard", "the cloud needs the cloud shard"),
    "adapter": ("edge", {"adapter": "nowhere"}, "adapter", "make one with privatelora adapter"),
    "second adapter": (
        "edge",
        {"adapters": {"other": "edge/model.safetensors"}},
        "adapters.other",
        "is not a PrivateLoRA adapter",
    ),
    "device": ("cloud", {"device": "cuda:99"}, "device", "device cuda:99: "),
    "trace": ("cloud", {"trace": "nowhere/trace.json"}, "trace", "cannot write into"),
    "no certificate": ("cloud", {"listen": "tls://localhost:1"}, "tls", "needs a certificate"),
    "keys of another": (
        "cloud",
        {"listen": "tls://localhost:1", "tls": {**TLS, "key": "edge/tls.key"}},
        "tls",
        "does not belong to the certificate",
    ),
    "no trust": (
        "cloud",
        {"listen": "tls://*:1", "tls": {**TLS, "trust": "nowhere"}},
        "tls",
        "cannot read the TLS trust",
    ),
    "unused keys": ("cloud", {"curve": CURVE}, "listen", "does not use the curve keys"),
    "public for secret": (
        "edge",
        {"cloud": "zmq+tcp://127.0.0.1:1", "curve": {**CURVE, "key": "edge/own.pub"}},
        "curve",
        "holds no secret CURVE key",
    ),
    "variable": (
        "edge",
        {"http": {"api_key": {"env": "PRIVATELORA_UNSET"}}},
        "http.api_key",
        "there is no secret in the environment variable PRIVATELORA_UNSET",
    ),
    "token in the clear": (
        "edge",
        {"cloud": "zmq+tcp://192.0.2.7:1", "token": {"file": "api-key"}},
        "token",
        "would go to zmq+tcp://192.0.2.7:1 unencrypted",
    ),
    "no tokens": ("cloud", {"tokens": "nowhere"}, "tokens", "cannot read"),
    "secret file": (
        "edge",
        {"http": {"api_key": {"file": "nowhere"}}},
        "http.api_key",
        "cannot read the secret in",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_key(check: Check, name: str) -> None:
    kind, changes, key, message = WRONG[name]
    report = check(kind, **changes)
    (error,) = report.findings.errors
    assert error.key == key
    assert message in error.message
    assert "\n" not in error.message


UNWISE: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "any certificate": (
        "cloud",
        {"listen": "tls://*:1", "tls": TLS, "open_to_all": True},
        "open_to_all",
        "everybody who can reach tls://*:1 is let in",
    ),
    "anybody": (
        "cloud",
        {"listen": "zmq+tcp://*:1", "open_to_all": True},
        "open_to_all",
        "everybody who can reach zmq+tcp://*:1 is let in, unencrypted",
    ),
    "metrics": ("cloud", {"metrics": "0.0.0.0:9464"}, "metrics", "answers everybody"),
    "in the clear": ("edge", {"cloud": "tcp://cloud.example:1"}, "cloud", "is not encrypted"),
    "rehearsal": ("edge", {"impaired": {}}, "impaired", "rehearses a worse network"),
}


@pytest.mark.parametrize("name", UNWISE)
def test_what_is_unwise_is_a_warning(check: Check, name: str) -> None:
    kind, changes, key, message = UNWISE[name]
    report = check(kind, **changes)
    assert report.is_right
    (warning,) = report.findings.warnings
    assert warning.key == key
    assert message in warning.message


@pytest.mark.parametrize("what", ["tls.key", "curve.key", "adapter", "http.api_key"])
def test_secrets_that_others_may_read(check: Check, deployment: Deployment, what: str) -> None:
    settings: dict[str, Any]
    match what:
        case "tls.key":
            keys = {"certificate": "edge/own.crt", "key": "edge/tls.key", "trust": "cloud/own.crt"}
            file, settings = "edge/tls.key", {"cloud": "tls://cloud.example:1", "tls": keys}
        case "curve.key":
            keys = {"key": "edge/curve.key", "trust": "cloud/own.pub"}
            file, settings = "edge/curve.key", {"cloud": "zmq+tcp://c.example:1", "curve": keys}
        case "adapter":
            file, settings = "adapter.safetensors", {}
        case _:
            file, settings = "api-key", {"http": {"api_key": {"file": "api-key"}}}
    path = deployment.directory / file
    if what == "http.api_key":
        path.write_text(SECRET)
    path.chmod(0o644)
    report = check("edge", **settings)
    assert report.is_right
    (warning,) = report.findings.warnings
    assert warning.key == what
    assert f"chmod 600 {path}" in warning.message
    path.chmod(0o600)
    assert not check("edge", **settings).findings.warnings


def test_a_certificate_that_is_over(
    check: Check, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

    from privatelora.runtime import link_check

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Later:
            return cls.fromtimestamp(super().now(tz).timestamp(), tz) + cls.ahead

        ahead = datetime.timedelta(days=0)

    settings = {"listen": "tls://*:1", "tls": {**TLS, "trust": "edge/own.crt"}}
    assert not check("cloud", **settings).findings.warnings
    monkeypatch.setattr(link_check.datetime, "datetime", Later)
    Later.ahead = datetime.timedelta(days=80)
    (soon,) = check("cloud", **settings).findings.warnings
    assert soon.key == "tls.certificate"
    assert "expires on 20" in soon.message
    Later.ahead = datetime.timedelta(days=101)
    over = check("cloud", **settings).findings
    assert [finding.key for finding in over.errors] == ["tls.certificate"]
    assert [finding.key for finding in over.warnings] == ["tls.trust"]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("listn: tcp://a:1\nshard: a", "cloud", "unknown key 'listn'; did you mean listen?"),
        ("clod: tcp://a:1\nadapter: a", "edge", "unknown key 'clod'; did you mean cloud?"),
        ("rank_op: 8", "plan", "unknown key 'rank_op'; did you mean rank_up"),
        ("layers: 5-2", "plan", "layers: '5-2' is empty"),
        ("rank_up: 0", "plan", "rank_up: Input should be greater than 0"),
        ("targets: o", "plan", "'o' is not a projection that can be adapted"),
        ("{num_layers: 4, layers: 0-4}", "plan", "the model has layers 0 to 3"),
        ("weather: fine", None, "neither a cloud's file (listen: ...) nor an edge's"),
        ("", None, "neither a cloud's file"),
        ("- listen", None, "expected keys and values"),
        ("a: [", None, "line 1: not valid YAML"),
        ("{7: 8, listen: a, shard: b}", "cloud", "7: Keys should be strings"),
    ],
)
def test_what_a_file_is_for(tmp_path: Path, text: str, kind: str | None, message: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    report = check_file(path)
    assert report.kind == kind
    (error,) = report.findings.errors
    assert message in error.message


# The commands

run = CliRunner().invoke


def test_every_file_gets_its_lines(deployment: Deployment, tmp_path: Path) -> None:
    good = deployment.cloud_yaml("good.yaml")
    open_to_all = deployment.cloud_yaml("open.yaml", listen="tcp://*:18230", open_to_all=True)
    result = run(app, ["config", "check", str(good), str(open_to_all)])
    assert result.exit_code == 0
    assert result.stdout == f"{good}: cloud, right\n{open_to_all}: cloud, right\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"warning: {open_to_all}: open_to_all: everybody who can reach tcp://*")

    bad = deployment.edge_yaml("tcp://a:b", "bad.yaml", shard="nowhere")
    missing = tmp_path / "nowhere.yaml"
    result = run(app, ["config", "check", str(good), str(bad), str(missing)])
    assert result.exit_code == 1
    assert result.stdout == f"{good}: cloud, right\n"
    lines = result.stderr.splitlines()
    assert [line.partition(" is not")[0] for line in lines[:2]] == [
        f"error: {bad}: cloud: address 'tcp://a:b'",
        f"error: {bad}: shard: {deployment.directory / 'nowhere'}",
    ]
    assert lines[2:] == [f"error: cannot read {missing}: No such file or directory"]


def test_json_says_the_same(deployment: Deployment) -> None:
    bad = deployment.edge_yaml("tcp://cloud.example:1", "bad.yaml", shard="nowhere")
    result = run(app, ["config", "check", "--json", str(bad)])
    assert (result.exit_code, result.stderr) == (1, "")
    (told,) = json.loads(result.stdout)
    assert (told["file"], told["kind"], told["right"]) == (str(bad), "edge", False)
    assert [error["key"] for error in told["errors"]] == ["shard"]
    assert [warning["key"] for warning in told["warnings"]] == ["cloud"]


@pytest.mark.parametrize(
    "http",
    [
        {"api_key": SECRET},
        {"api_key": {"file": "key-file", "env": "PRIVATELORA_TEST_KEY"}},
        {"api_key": {"env": "PRIVATELORA_TEST_KEY"}},
        {"api_key": {"file": "key-file"}},
        {"listen": SECRET},
        {"api_key": {"env": "PRIVATELORA_TEST_KEY"}, "cors_origins": ["nonsense"]},
    ],
)
def test_no_secret_is_shown(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, http: dict[str, Any]
) -> None:
    monkeypatch.setenv("PRIVATELORA_TEST_KEY", SECRET)
    (deployment.directory / "key-file").write_text(SECRET)
    file = deployment.edge_yaml("tcp://127.0.0.1:1", "secret.yaml", http=http)
    for options in ([], ["--json"]):
        result = run(app, ["config", "check", *options, str(file)])
        if "listen" not in http:  # an address is no secret
            assert SECRET not in result.output + result.stderr


def properties(schema: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(schema["$defs"][name]["properties"])


@pytest.mark.parametrize("kind", MODELS)
def test_the_schema_names_every_key_and_explains_it(kind: str) -> None:
    result = run(app, ["config", "schema", kind])
    assert (result.exit_code, result.stderr) == (0, "")
    schema = json.loads(result.stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    model: type[BaseModel] = MODELS[kind]
    assert {*schema["properties"]} == {*model.model_fields}
    assert schema["additionalProperties"] is False
    for name, field in schema["properties"].items():
        explained = "description" in field or "$ref" in str(field)
        assert explained, name


def test_the_schema_allows_what_is_short_for_more() -> None:
    schema = json.loads(run(app, ["config", "schema", "edge"]).stdout)
    definitions = schema["$defs"]
    for name in ("PayloadConfig", "UpConfig", "DownConfig"):
        kinds = {option["type"]: option for option in definitions[name]["anyOf"]}
        assert kinds["string"]["enum"] == list(CODEC_NAMES)
        assert kinds["object"]["additionalProperties"] is False
    fields = next(
        option for option in definitions["UpConfig"]["anyOf"] if option["type"] == "object"
    )
    assert {option["type"] for option in fields["properties"]["exchange"]["anyOf"]} == {
        "string",
        "array",
    }
