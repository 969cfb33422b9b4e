"""``privatelora``: everything that is not a daemon."""

from __future__ import annotations

from typing import Annotated

import typer

from privatelora import __version__
from privatelora.cli import adapter, chat, config, demo, generate, keys, partition, plan, status
from privatelora.cli._app import run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run a language model in the cloud with personal parameters that stay on your device.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"privatelora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


partition.register(app)
adapter.register(app)
chat.register(app)
generate.register(app)
keys.register(app)
config.register(app)
status.register(app)
plan.register(app)
demo.register(app)


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
