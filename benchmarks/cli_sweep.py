"""Commands that measure over many networks, and that lay results beside each other."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer

from privatelora.benchmarks.options import (
    DEFAULT_MODEL,
    DtypeOption,
    EveryOption,
    FloatDtype,
    JsonOption,
    ModelOption,
    PlotOption,
    RttOption,
    finish,
    numbers,
    print_table,
    progress,
    working,
)
from privatelora.cli._app import check_writable, print_json


def register(app: typer.Typer) -> None:
    """Add the commands to a program."""
    app.command(epilog=SWEEP_EXAMPLE)(sweep)
    app.command(epilog=PROFILE_EXAMPLE)(profile)
    app.command(epilog=COMPARE_EXAMPLE)(compare)
    app.command(epilog=SCHEMA_EXAMPLE)(schema)


SWEEP_EXAMPLE = (
    "Example: privatelora-bench sweep configs/sweep-networks.yaml --json a.json --plot a.png"
)


def sweep(
    config: Annotated[Path, typer.Argument(help="File of settings.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for what was measured, instead of the file's."),
    ] = None,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Measure tokens/s over emulated networks, with baselines and predictions beside it.

    Networks x arrangements x payloads x transports x sessions, with real daemons. What was
    measured is kept: a run that was cut off goes on, and one that is complete is shown again.
    """
    from privatelora.benchmarks.show import check_plotting
    from privatelora.benchmarks.sweep import measure_sweep
    from privatelora.benchmarks.sweep_config import read_sweep_config
    from privatelora.benchmarks.sweep_show import sweep_plot, sweep_table

    settings = read_sweep_config(config)
    if out is not None:
        settings = settings.model_copy(update={"out": out})
    check_writable(json_file)
    check_plotting(plot_file)
    check_writable(plot_file)
    with progress() as report:
        result = measure_sweep(settings, report)
    finish(result, sweep_table(result), json_file)
    if plot_file is not None:
        sweep_plot(result, plot_file)


PROFILE_EXAMPLE = "Example: privatelora-bench profile --rtt-ms 0,20 --plot token.png"


def profile(
    model: ModelOption = DEFAULT_MODEL,
    every: EveryOption = 1,
    rtts_ms: RttOption = "0,5,20",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 32,
    tokens: Annotated[int, typer.Option(min=8, max=60, help="Tokens that are decoded.")] = 24,
    dtype: DtypeOption = FloatDtype.BFLOAT16,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Show where the time of one token goes, at both ends and between them."""
    from privatelora.benchmarks.profile import measure_profile
    from privatelora.benchmarks.profile_show import profile_plot, profile_table
    from privatelora.benchmarks.serve import ServeSettings
    from privatelora.benchmarks.show import check_plotting

    check_writable(json_file)
    check_plotting(plot_file)
    check_writable(plot_file)
    distances = numbers("--rtt-ms", rtts_ms)
    with working() as (directory, report):
        settings = ServeSettings(
            model=model,
            every=every,
            rtts_ms=distances,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            dtype=dtype.value,
            directory=directory,
        )
        result = measure_profile(settings, report)
    finish(result, profile_table(result), json_file)
    if plot_file is not None:
        profile_plot(result, plot_file)


COMPARE_EXAMPLE = "Example: privatelora-bench compare before.json after.json"


def compare(
    first: Annotated[Path, typer.Argument(help="A result, written with --json.")],
    second: Annotated[Path, typer.Argument(help="Another of the same benchmark.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two results of the same benchmark, figure by figure."""
    from privatelora.benchmarks.result import compare as lay_beside
    from privatelora.benchmarks.result import read_result
    from privatelora.benchmarks.sweep_show import changes_table

    changes = lay_beside(read_result(first), read_result(second))
    ratios = [change.ratio for change in changes if change.ratio == change.ratio]
    apart = sum(change.is_within is False for change in changes)
    summary = {
        "figures": len(changes),
        "median_ratio": statistics.median(ratios) if ratios else None,
        "apart": apart,
    }
    if as_json:
        print_json({**summary, "changes": [change._asdict() for change in changes]})
        return
    print_table(changes_table(changes, (first.name, second.name)))
    print(f"{len(changes)} figures in both; of those with a spread, {apart} lie apart")


SCHEMA_EXAMPLE = "Example: privatelora-bench schema > result.schema.json"


def schema() -> None:
    """Print the JSON Schema of what benchmarks write with --json."""
    from privatelora.benchmarks.result import Result

    print_json(Result.model_json_schema())
