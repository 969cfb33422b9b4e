"""What a person who installs the package gets, built here without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "privatelora": "privatelora",
    "privatelora.benchmarks": "benchmarks",
    "privatelora.partition": "partition",
    "privatelora.runtime": "runtime",
    "privatelora.training": "training",
    "privatelora.transports": "transports",
}
"""Where each part of the package lies in the repository."""
COMMANDS = {
    "privatelora",
    "privatelora-serve",
    "privatelora-edge",
    "privatelora-bench",
    "privatelora-train",
}


def packages_on_disk() -> set[str]:
    """Every folder with an ``__init__.py``, by the name it is imported under."""
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):  # does not follow the symlinks
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *inner]))
    return found


def modules_on_disk() -> set[str]:
    """Every module as a path inside a wheel."""
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT / folder)
            found.add(str(Path(*package.split("."), inner)))
    return found


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def run_python(*arguments: str, **environment: str) -> str:
    """Run an interpreter outside the repository; what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=os.sep,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist of a copy of the repository."""
    copy = tmp_path_factory.mktemp("packaging") / "copy"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "tests", "out", "build")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    run_python("-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy))
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    (built,) = (copy / "dist").glob("*.whl")
    assert sdist.name.startswith("privatelora-")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_package_is_listed() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert len(set(listed)) == len(listed)
    assert set(listed) == packages_on_disk()
    assert {"privatelora.runtime.wire", "privatelora.partition.models"} <= set(listed)


def test_every_module_is_in_the_wheel(names: set[str]) -> None:
    assert modules_on_disk() - names == set()


def test_nothing_but_the_package_is_at_the_top(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    (metadata,) = tops - {"privatelora"}
    assert metadata.startswith("privatelora-")
    assert metadata.endswith(".dist-info")


def test_nothing_else_is_in_the_wheel(names: set[str]) -> None:
    inside = {name for name in names if name.startswith("privatelora/")}
    page = {name for name in inside if name.startswith("privatelora/runtime/http/page/")}
    prompts = "privatelora/training/data/general_prompts.txt"
    adapter = "privatelora/cli/demo_adapter.safetensors"
    assert inside - modules_on_disk() == {"privatelora/py.typed", prompts, adapter} | page
    assert {Path(name).name for name in page} == {
        file.name for file in (ROOT / "runtime" / "http" / "page").iterdir()
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_every_command_starts_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (entry_points,) = tmp_path.glob("*.dist-info/entry_points.txt")
    parser = ConfigParser()
    parser.read(entry_points)
    commands = dict(parser["console_scripts"])
    assert set(commands) == COMMANDS == set(pyproject()["project"]["scripts"])
    script = (
        "import importlib, sys\n"
        "for target in sys.argv[1:]:\n"
        "    module, name = target.split(':')\n"
        "    assert callable(getattr(importlib.import_module(module), name))\n"
        "    print(sys.modules[module].__file__)\n"
    )
    files = run_python("-c", script, *commands.values(), PYTHONPATH=str(tmp_path)).split()
    assert all(Path(file).is_relative_to(tmp_path) for file in files)
    assert len(files) == len(COMMANDS)


def loaded_by(*arguments: str) -> set[str]:
    """Top-level packages that a Python program loads."""
    script = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('LOADED', *{m.partition('.')[0] for m in sys.modules}))\n"
        "module, *sys.argv[1:] = sys.argv[1:]\n"
        "if sys.argv[1:]: runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
        "else: __import__(module)\n"
    )
    return set(run_python("-c", script, *arguments).rpartition("LOADED")[2].split())


HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "gguf", "huggingface_hub"}


@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        (["privatelora.runtime.wire.state"], HEAVY | {"asyncio", "socket", "uvloop"}),
        (["privatelora.transports.tcp"], HEAVY),
        (["privatelora.transports.registry"], HEAVY),
        (["privatelora.runtime.config"], HEAVY),
        (["privatelora.cli.main", "--help"], HEAVY),
        (["privatelora.cli.serve", "--help"], HEAVY),
        (["privatelora.cli.edge", "--help"], HEAVY),
        (["privatelora.benchmarks.cli", "--help"], HEAVY),
        (["privatelora.runtime.cloud"], {"transformers", "tokenizers", "gguf", "huggingface_hub"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_needed_is_not_loaded(arguments: list[str], left_out: set[str]) -> None:
    loaded = loaded_by(*arguments)
    assert "privatelora" in loaded
    assert loaded & left_out == set()
