"""Commands that measure training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from privatelora.benchmarks.options import (
    DEFAULT_MODEL,
    EveryOption,
    FloatDtype,
    JsonOption,
    ModelOption,
    PlotOption,
    RttOption,
    finish,
    numbers,
    working,
)
from privatelora.cli._app import check_writable
from privatelora.cli._daemons import num_threads_beside_another


def register(app: typer.Typer) -> None:
    """Add the commands to a program."""
    app.command(epilog=ARRANGEMENTS_EXAMPLE)(arrangements)
    app.command(epilog=TRAINING_EXAMPLE)(training)


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
    steps: Annotated[int, typer.Option(min=1, help="Of training, in every row.")] = 100,
    tune_steps: Annotated[
        int, typer.Option(min=1, help="Of each run that a learning rate is chosen by.")
    ] = 16,
    batch_size: Annotated[int, typer.Option(min=2, help="Examples in a step.")] = 6,
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


TRAINING_EXAMPLE = (
    "Example: privatelora-bench training --rtt-ms 20 --json training.json --plot training.png\n\n"
    "privatelora-bench training --rows lora-all,per-layer,split-per-layer --batch-size 8"
)


def training(
    model: ModelOption = DEFAULT_MODEL,
    rows: Annotated[
        str,
        typer.Option(
            help="Some of full, lora-all, lora-qkv, per-layer, grouped, split-per-layer and "
            "split-grouped. [default: all]",
            show_default=False,
        ),
    ] = "",
    rtts_ms: RttOption = "0",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Of each sequence.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Of each contender in a round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="In which all take turns.")] = 3,
    every: EveryOption = 6,
    rank: Annotated[int, typer.Option(min=1, help="Of exchanges per layer.")] = 128,
    grouped_rank: Annotated[int, typer.Option(min=1, help="Of exchanges for --every layers.")] = 32,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="Per process. [default: half the processors]")
    ] = None,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Compare how fast full fine-tuning, LoRA and PrivateLoRA train, in one place and split.

    Split ones are measured without any distance, and at those of --rtt-ms. Every contender holds
    the model for itself: all of the default model together take 12 GB.
    """
    from privatelora.benchmarks.show import check_plotting
    from privatelora.benchmarks.training_speed import measure_training_speed
    from privatelora.benchmarks.training_speed_rows import TrainingSpeedSettings
    from privatelora.benchmarks.training_speed_show import (
        training_speed_plot,
        training_speed_table,
    )

    check_writable(json_file)
    check_plotting(plot_file)
    check_writable(plot_file)
    distances = numbers("--rtt-ms", rtts_ms)
    with working() as (directory, report):
        result = measure_training_speed(
            TrainingSpeedSettings(
                model=model,
                rows=tuple(name.strip() for name in rows.split(",")) if rows else (),
                rtts_ms=distances,
                batch_size=batch_size,
                tokens=tokens,
                steps=steps,
                rounds=rounds,
                every=every,
                rank=rank,
                grouped_rank=grouped_rank,
                num_threads=num_threads or num_threads_beside_another(),
                directory=directory,
            ),
            report,
        )
    finish(result, training_speed_table(result), json_file)
    if plot_file is not None:
        training_speed_plot(result, plot_file)
