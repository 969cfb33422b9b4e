"""Files with CURVE keys: written once, read strictly, and never shown."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from privatelora.errors import ConfigError
from privatelora.transports.curve_keys import (
    new_curve_key,
    read_public_key,
    read_public_keys,
    read_secret_key,
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    secret, public = tmp_path / "end.key", tmp_path / "end.pub"
    new_curve_key(secret, public)
    return secret, public


def test_what_is_written_can_be_read(pair: tuple[Path, Path]) -> None:
    secret, public = pair
    public_key, secret_key = read_secret_key(secret)
    assert read_public_key(public) == public_key == zmq.curve_public(secret_key)
    assert secret_key not in public.read_bytes()
    assert secret.read_text().startswith("# CURVE key pair")
    assert public.read_text() == (
        "# CURVE public key of one end of PrivateLoRA: for the peers that shall trust it\n"
        f"public: {public_key.decode()}\n"
    )


def test_each_pair_is_another(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    new_curve_key(tmp_path / "other.key", tmp_path / "other.pub")
    assert len(read_public_keys(tmp_path)) == 2


def test_only_the_owner_may_read_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    real_open = os.open

    def recording_open(path: Path, flags: int, mode: int) -> int:
        fd = real_open(path, flags, mode)
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        return fd

    monkeypatch.setattr(os, "open", recording_open)
    before = os.umask(0)
    try:
        new_curve_key(tmp_path / "end.key", tmp_path / "end.pub")
    finally:
        os.umask(before)
    assert modes == [0o600, 0o644]
    assert stat.S_IMODE((tmp_path / "end.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "end.pub").stat().st_mode) == 0o644


@pytest.mark.parametrize("existing", ["end.key", "end.pub"])
def test_nothing_is_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigError, match=f"{existing} exists and is not overwritten"):
        new_curve_key(tmp_path / "end.key", tmp_path / "end.pub")
    assert [file.name for file in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "precious"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "end.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        new_curve_key(tmp_path / "end.key", tmp_path / "end.pub")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("missing", ["key", "pub"])
def test_a_folder_that_is_missing(tmp_path: Path, missing: str) -> None:
    paths = {suffix: tmp_path / f"end.{suffix}" for suffix in ("key", "pub")}
    paths[missing] = tmp_path / "nowhere" / f"end.{missing}"
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere.*no such file"):
        new_curve_key(paths["key"], paths["pub"])
    assert list(tmp_path.iterdir()) == []


Change = Callable[[str], str]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "# only a comment\n",
        lambda text: text.replace("secret:", "hidden:"),
        lambda text: text.replace("secret: ", "secret "),
        lambda text: text.replace("secret: ", "secret: x"),
        lambda text: text.rstrip()[:-1],
        lambda text: text.rstrip()[:-1] + "~",
        lambda text: text.rstrip()[:-5] + "#####",
        lambda text: text + text,
        lambda text: text + "and more\n",
        lambda text: text + "x" * 10_000,
        lambda text: text + "\x00\xff",
        lambda text: text.replace("public: ", "# public: "),
    ],
)
def test_a_damaged_secret_file(pair: tuple[Path, Path], change: Change) -> None:
    secret, _ = pair
    _, secret_key = read_secret_key(secret)
    secret.write_text(change(secret.read_text()), encoding="latin-1")
    with pytest.raises(ConfigError) as caught:
        read_secret_key(secret)
    assert str(secret) in str(caught.value)
    assert secret_key[:20].decode() not in str(caught.value)
    assert caught.value.__cause__ is None


def test_keys_of_two_pairs_do_not_mix(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    new_curve_key(tmp_path / "other.key", tmp_path / "other.pub")
    public_line = (tmp_path / "other.pub").read_text().splitlines()[1]
    secret_line = pair[0].read_text().splitlines()[2]
    pair[0].write_text(f"{public_line}\n{secret_line}\n")
    with pytest.raises(ConfigError, match="does not belong to its secret key"):
        read_secret_key(pair[0])


def test_secret_and_public_files_are_not_confused(pair: tuple[Path, Path]) -> None:
    secret, public = pair
    with pytest.raises(ConfigError, match=r"holds no secret CURVE key; give the \.key file"):
        read_secret_key(public)
    with pytest.raises(ConfigError, match=r"holds a secret CURVE key, .* give the \.pub file"):
        read_public_key(secret)


def test_editors_may_change_line_ends_and_add_comments(pair: tuple[Path, Path]) -> None:
    key = read_public_key(pair[1])
    pair[1].write_bytes(b"\r\n# of the kitchen\r\npublic:" + key + b"  \r\n\r\n")
    assert read_public_key(pair[1]) == key


def test_a_folder_gives_its_public_files_only(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "README").write_text("not a key")
    assert read_public_keys(tmp_path) == {read_public_key(pair[1])}
    assert read_public_keys(pair[1]) == {read_public_key(pair[1])}
    (tmp_path / "bad.pub").write_text("not a key")
    with pytest.raises(ConfigError, match=r"bad\.pub is not a CURVE key file"):
        read_public_keys(tmp_path)


def test_an_empty_folder_trusts_nobody(tmp_path: Path) -> None:
    assert read_public_keys(tmp_path) == frozenset()


@pytest.mark.parametrize("read", [read_secret_key, read_public_key, read_public_keys])
def test_a_file_that_is_missing(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*end\.key: no such file"):
        read(tmp_path / "end.key")
