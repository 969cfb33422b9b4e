"""``privatelora keys``: what it writes, who can read it, and that it works."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from privatelora.cli._app import run
from privatelora.cli.main import app
from privatelora.runtime.client_tokens import load_tokens
from privatelora.runtime.config import load_cloud_config, load_edge_config
from privatelora.transports.base import Connection, Limits
from privatelora.transports.curve_keys import read_public_key, read_secret_key
from privatelora.transports.registry import connect, listen


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


NewKeys = Callable[..., Result]


@pytest.fixture
def keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> NewKeys:
    """Run ``privatelora keys`` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["privatelora", "keys", *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
        with pytest.raises(SystemExit) as exit_info:
            run(app)
        captured = capsys.readouterr()
        return Result(int(exit_info.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def new_keys(keys: NewKeys) -> NewKeys:
    """Run ``privatelora keys new`` there."""
    return partial(keys, "new")


@pytest.fixture(params=[0o000, 0o022, 0o277], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}


def refused(result: Result) -> str:
    """The message of a command that failed as it should."""
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    return result.err


@pytest.mark.usefixtures("umask")
def test_private_files_are_private_under_any_umask(new_keys: NewKeys, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys").chmod(0o700)
    assert new_keys("alice").code == 0
    folder = tmp_path / "keys" / "alice"
    assert folder.stat().st_mode & 0o777 == 0o700
    found = modes(folder)
    assert set(found) == {"tls.key", "alice.crt", "curve.key", "alice.pub"}
    assert found["tls.key"] == 0o600
    assert found["curve.key"] & 0o077 == 0
    assert os.listdir(tmp_path / "keys") == ["alice"]


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("tls", {"tls.key", "bob.crt"}),
        ("curve", {"curve.key", "bob.pub"}),
        ("both", {"tls.key", "bob.crt", "curve.key", "bob.pub"}),
    ],
)
def test_kinds(new_keys: NewKeys, tmp_path: Path, kind: str, files: set[str]) -> None:
    result = new_keys("bob", "--kind", kind, "--dir", tmp_path / "a" / "b", "--json")
    assert result.code == 0, result.err
    made = tmp_path / "a" / "b" / "bob"
    assert set(modes(made)) == files
    assert {Path(file).name for file in result.json["keep"] + result.json["give"]} == files
    assert all(file.endswith(".key") for file in result.json["keep"])
    assert set(result.json["settings"]["this_side"]) == {"tls", "curve"} & {kind} or {
        "tls",
        "curve",
    }
    assert (result.json["identity"] is None) == (kind == "curve")


def test_what_is_printed_can_be_pasted(new_keys: NewKeys, tmp_path: Path) -> None:
    """The settings shown for one side and the other load, and name the files that were made."""
    directory = tmp_path / "with: a difficult # name"
    shown = new_keys("alice", "--dir", directory)
    assert shown.code == 0, shown.err
    blocks = [
        yaml.safe_load(block)
        for block in shown.out.split("\n\n")
        if block.startswith(("tls:", "curve:"))
    ]
    folder = directory / "alice"
    assert blocks == [
        {
            "tls": {
                "certificate": str(folder / "alice.crt"),
                "key": str(folder / "tls.key"),
                "trust": "FROM-THE-OTHER-SIDE.crt",
            }
        },
        {"tls": {"trust": "alice.crt"}},
        {"curve": {"key": str(folder / "curve.key"), "trust": "FROM-THE-OTHER-SIDE.pub"}},
        {"curve": {"trust": "alice.pub"}},
    ]
    for name, load in (("cloud: tcp://h:1", load_edge_config), ("listen: x", load_cloud_config)):
        file = tmp_path / "settings.yaml"
        file.write_text(f"{name}\nshard: x\n{yaml.safe_dump(blocks[0])}{yaml.safe_dump(blocks[2])}")
        credentials = load(file).credentials()
        assert credentials.tls is not None
        assert credentials.tls.private_key == folder / "tls.key"
        assert credentials.curve is not None
        assert credentials.curve.secret_key == folder / "curve.key"
    for file in folder.iterdir():
        assert file.name in shown.out
    assert "a cloud's needs --host" in shown.out
    assert "needs --host" not in new_keys("cloud", "--host", "localhost").out


async def test_a_cloud_and_an_edge_with_new_keys_find_each_other(
    new_keys: NewKeys, tmp_path: Path
) -> None:
    cloud = new_keys("cloud", "--host", "localhost", "--host", "127.0.0.1", "--json").json
    edge = new_keys("edge", "--json").json
    settings = {}
    for name, own, other in (("cloud", cloud, edge), ("edge", edge, cloud)):
        [certificate] = [file for file in other["give"] if file.endswith(".crt")]
        tls = {**own["settings"]["this_side"]["tls"], "trust": str(tmp_path / certificate)}
        settings[name] = tmp_path / f"{name}.yaml"
        settings[name].write_text(yaml.safe_dump({"tls": tls, "shard": "x", **PLACES[name]}))
    identities: list[str | None] = []

    async def handler(connection: Connection) -> None:
        identities.append(connection.identity)
        await connection.send(b"welcome")

    keys = load_cloud_config(settings["cloud"]).credentials()
    async with await listen("tls://127.0.0.1:0", handler, Limits(), keys) as listener:
        keys = load_edge_config(settings["edge"]).credentials()
        for address in (listener.address, listener.address.replace("127.0.0.1", "localhost")):
            async with await connect(address, Limits(), keys) as connection:
                assert bytes(await connection.recv()) == b"welcome"
                assert connection.identity == cloud["identity"]
    assert identities == [edge["identity"]] * 2


PLACES = {"cloud": {"listen": "tls://127.0.0.1:0"}, "edge": {"cloud": "tls://127.0.0.1:1"}}


def test_curve_keys_belong_together(new_keys: NewKeys, tmp_path: Path) -> None:
    made = new_keys("bob", "--kind", "curve", "--json").json
    public, _secret = read_secret_key(tmp_path / made["keep"][0])
    assert read_public_key(tmp_path / made["give"][0]) == public


def test_nothing_is_overwritten(new_keys: NewKeys, tmp_path: Path) -> None:
    assert new_keys("alice").code == 0
    folder = tmp_path / "keys" / "alice"
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for kind in ("tls", "curve", "both"):
        assert f"{Path('keys/alice')} exists; choose another name" in refused(
            new_keys("alice", "--kind", kind)
        )
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert os.listdir(tmp_path / "keys") == ["alice"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b"], "'a/b' cannot name a folder of keys; use up to 64"),
        ([".."], "'..' cannot name a folder of keys"),
        ([""], "'' cannot name a folder of keys"),
        (["x" * 65], "cannot name a folder of keys"),
        (["a", "--host", "tls://cloud:1"], "'tls://cloud:1' is not a host: give a name such as"),
        (["a", "--host", "0.0.0.0"], "0.0.0.0 means every interface; give the names"),
        (["a", "--host", "::"], ":: means every interface"),
        (["a", "--host", "x" * 64], "is not a host"),
        (["a", "--days", "0"], "valid for 1 to 3650 days, not 0"),
        (["a", "--days", "99999"], "valid for 1 to 3650 days, not 99999"),
        (["a", "--kind", "curve", "--days", "3"], "--host and --days belong to a certificate"),
        (["a", "--kind", "curve", "--host", "h"], "--host and --days belong to a certificate"),
        (["a", "--dir", "file"], "cannot write into file: "),
        (["a", "--dir", "file/below"], "cannot write into file/below: "),
        (["a", "--dir", "/proc/nowhere"], "cannot write into /proc/nowhere: "),
    ],
)
def test_what_cannot_be_done(
    new_keys: NewKeys, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert message in refused(new_keys(*arguments))
    keys = tmp_path / "keys"
    assert not keys.exists() or os.listdir(keys) == []


def test_a_failure_half_way_leaves_nothing(
    new_keys: NewKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    assert "cannot make keys/alice: No space left on device" in refused(new_keys("alice"))
    assert os.listdir(tmp_path / "keys") == []


@pytest.mark.usefixtures("umask")
def test_a_token_is_private_and_its_line_is_what_the_cloud_knows_it_by(
    keys: NewKeys, tmp_path: Path
) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys").chmod(0o700)
    lines = ""
    for name in ("alice", "123", "yes", "bob.laptop"):
        shown = keys("token", name)
        assert shown.code == 0, shown.err
        file = tmp_path / "keys" / f"{name}.token"
        assert file.stat().st_mode & 0o777 == 0o600
        secret = file.read_text().strip()
        assert len(secret) >= 43
        assert secret not in shown.out
        edge, line = (
            block for block in shown.out.split("\n\n") if ": " in block and block[0] != "M"
        )
        assert yaml.safe_load(edge) == {"token": {"file": str(file)}}
        lines += line
    (tmp_path / "tokens.yaml").write_text(lines)
    tokens = load_tokens(tmp_path / "tokens.yaml")
    for file in (tmp_path / "keys").iterdir():
        assert tokens.name_of(file.read_text().strip()) == file.name.removesuffix(".token")
    assert tokens.name_of("something else") is None


def test_the_settings_of_a_token_name_its_file(keys: NewKeys, tmp_path: Path) -> None:
    made = keys("token", "alice", "--dir", tmp_path / "a" / "b", "--json").json
    file = tmp_path / "a" / "b" / "alice.token"
    assert made["file"] == str(file)
    settings = tmp_path / "edge.yaml"
    edge = {"cloud": "tls://h:1", "shard": "x", **made["settings"]["edge"]}
    settings.write_text(yaml.safe_dump(edge))
    token = load_edge_config(settings).token
    assert token is not None
    secret = file.read_text().strip()
    assert token.read().get_secret_value() == secret
    assert secret not in json.dumps(made)
    assert list(made["settings"]["tokens"]) == ["alice"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b"], "'a/b' cannot name a client; use up to 64"),
        ([""], "'' cannot name a client"),
        (["taken", "--dir", "."], "taken.token exists; choose another name"),
        (["a", "--dir", "file"], "cannot write into file: "),
        (["a", "--dir", "file/below"], "cannot write into file/below: "),
        (["a", "--dir", "/proc/nowhere"], "cannot write into /proc/nowhere: "),
    ],
)
def test_a_token_that_cannot_be_made(
    keys: NewKeys, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "taken.token").write_text("of somebody")
    assert message in refused(keys("token", *arguments))
    assert (tmp_path / "taken.token").read_text() == "of somebody"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken.token"}
