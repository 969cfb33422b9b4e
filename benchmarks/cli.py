"""``privatelora-bench``: measurements of the runtime."""

from __future__ import annotations

import typer

from privatelora.benchmarks import (
    cli_link,
    cli_many,
    cli_model,
    cli_one,
    cli_predict,
    cli_sweep,
    cli_train,
)
from privatelora.cli._app import run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure the runtime on this machine.",
)
for commands in (cli_one, cli_many, cli_link, cli_train, cli_predict, cli_sweep, cli_model):
    commands.register(app)


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
