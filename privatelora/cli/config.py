"""``privatelora config``: whether files of settings are right, and what may be in them."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privatelora.cli._app import EXIT_ERROR, print_json

if TYPE_CHECKING:
    from pydantic import BaseModel

    from privatelora.runtime.config_check import Report
    from privatelora.runtime.link_check import Finding

CHECK_EXAMPLE = "Example: privatelora config check configs/cloud-lan.yaml configs/edge-lan.yaml"
SCHEMA_EXAMPLE = "Example: privatelora config schema edge > edge.schema.json"

app = typer.Typer(no_args_is_help=True, help="Check files of settings, and describe them.")


class Kind(StrEnum):
    """What a file of settings is for."""

    CLOUD = "cloud"
    EDGE = "edge"
    PLAN = "plan"
    TRAINING = "training"
    SWEEP = "sweep"


def register(main: typer.Typer) -> None:
    """Add the commands to a program, as ``config``."""
    main.add_typer(app, name="config")


@app.command("check", epilog=CHECK_EXAMPLE)
def check(
    files: Annotated[
        list[Path], typer.Argument(help="Files of a cloud, an edge, a plan, a training or a sweep.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say of each file what it is for and whether it is right.

    Looks at everything that a daemon's file refers to as well: shards, adapters, keys, secrets and
    addresses. Warns of what works and is unwise. Exit status 1 if a file is wrong.
    """
    from privatelora.runtime.config_check import check_file

    # What a transport would log about keys while it reads them is said here as a warning.
    logging.getLogger("privatelora.transports").addHandler(logging.NullHandler())
    models = _models()
    reports = [check_file(file, models) for file in files]
    if as_json:
        print_json([_summary(report) for report in reports])
    else:
        for report in reports:
            _print(report)
    if not all(report.is_right for report in reports):
        raise typer.Exit(EXIT_ERROR)


@app.command("schema", epilog=SCHEMA_EXAMPLE)
def schema(
    kind: Annotated[Kind, typer.Argument(help="Which kind of file.")],
) -> None:
    """Print the JSON schema of a kind of file, with which editors complete and explain keys.

    They find it by a first line such as `# yaml-language-server: $schema=edge.schema.json`.
    """
    print_json(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **_models()[kind].model_json_schema(),
        }
    )


def _models() -> dict[str, type[BaseModel]]:
    """What each kind of file is read as."""
    from privatelora.benchmarks.sweep_config import SweepConfig
    from privatelora.runtime.config_check import MODELS
    from privatelora.training.config import TrainConfig

    return {**MODELS, Kind.TRAINING: TrainConfig, Kind.SWEEP: SweepConfig}


def _summary(report: Report) -> dict[str, Any]:
    def listed(findings: list[Finding]) -> list[dict[str, str]]:
        return [{"key": finding.key, "message": finding.message} for finding in findings]

    return {
        "file": str(report.file),
        "kind": report.kind,
        "right": report.is_right,
        "errors": listed(report.findings.errors),
        "warnings": listed(report.findings.warnings),
    }


def _print(report: Report) -> None:
    file, findings = str(report.file), report.findings
    if report.is_right:
        print(f"{file}: {report.kind}, right", flush=True)
    for word, found in (("error", findings.errors), ("warning", findings.warnings)):
        for finding in found:
            text = str(finding)
            where = "" if not finding.key and file in text else f"{file}: "
            print(f"{word}: {where}{text}", file=sys.stderr)
