"""docs/DEPENDENCIES.md says what a user installs: every direct dependency, and nothing else."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = ["package", "what for", "licence", "reads", "native"]


def table() -> list[list[str]]:
    """Rows of the document's table, the head first."""
    lines = (ROOT / "docs/DEPENDENCIES.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def direct_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in project["dependencies"])
    return {name[0] for name in names if name is not None}


def test_every_direct_dependency_is_explained() -> None:
    head, *rows = table()
    assert head == COLUMNS
    names = [row[0] for row in rows]
    assert names == sorted(names)
    assert set(names) == direct_dependencies()
    assert all(len(row) == len(COLUMNS) and all(row) for row in rows)


def test_who_brings_native_code_says_so() -> None:
    for name, _, _, _, native in table()[1:]:
        files = [str(file) for file in metadata.files(name) or []]
        if any(file.endswith(".so") or ".so." in file for file in files):
            assert native.startswith("yes"), name


def test_an_audit_is_offered_and_is_no_dependency_of_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = (project["dependencies"], *project["optional-dependencies"].values())
    declared = [line for group in groups for line in group]
    assert not any("pip-audit" in line for line in declared)
    assert re.search(r"^audit: venv$", (ROOT / "Makefile").read_text(), re.MULTILINE)
