"""Commands that measure training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from privatelora.benchmarks.options import (
    DEFAULT_MODEL,
    FloatDtype,
    JsonOption,
    ModelOption,
    PlotOption,
    finish,
)
from privatelora.cli._app import check_writable


def register(app: typer.Typer) -> None:
    """Add the commands to a program."""
    app.command(epilog=ARRANGEMENTS_EXAMPLE)(arrangements)


ARRANGEMENTS_EXAMPLE = (
    "Example: privatelora-bench arrangements --json arrangements.json --plot arrangements.png"
)


def arrangements(
    model: ModelOption = DEFAULT_MODEL,
    directory: Annotated[
        Path, typer.Option(help="Where rows are kept; a run that was cut off goes on there.")
    ] = Path("out/arrangements"),
    rows: Annotated[
        str, typer.Option(help="Names of the rows. [default: all]", show_default=False)
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="Of training, in every row.")] = 240,
    tune_steps: Annotated[
        int, typer.Option(min=1, help="Of each run that a learning rate is chosen by.")
    ] = 40,
    batch_size: Annotated[int, typer.Option(min=2, help="Examples in a step.")] = 8,
    held_out: Annotated[int, typer.Option(min=1, help="Questions of the reasoning task.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of examples and their order.")] = 0,
    dtype: Annotated[
        FloatDtype, typer.Option(help="Of the frozen weights; float32 with the row full.")
    ] = FloatDtype.FLOAT32,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Train every arrangement and method on the same tasks; accuracy against round trips.

    All rows of the default model take hours on a processor; those that are done are kept.
    """
    from privatelora.benchmarks.arrangements import ArrangementSettings, measure_arrangements
    from privatelora.benchmarks.arrangements_show import arrangements_plot, arrangements_table
    from privatelora.benchmarks.show import check_plotting

    check_writable(json_file)
    check_plotting(plot_file)
    check_writable(plot_file)
    directory.mkdir(parents=True, exist_ok=True)
    settings = ArrangementSettings(
        directory=directory,
        model=model,
        steps=steps,
        tune_steps=tune_steps,
        batch_size=batch_size,
        num_held_out=held_out,
        seed=seed,
        dtype=dtype.value,
        device=device,
        rows=tuple(name.strip() for name in rows.split(",")) if rows else (),
    )
    console = Console(stderr=True)
    result = measure_arrangements(settings, lambda line: console.log(line, _stack_offset=2))
    finish(result, arrangements_table(result), json_file)
    if plot_file is not None:
        arrangements_plot(result, plot_file)
