"""Commands that measure one conversation and its numbers."""

from __future__ import annotations

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
    working,
)
from privatelora.benchmarks.show import overhead_table
from privatelora.cli._app import check_writable
from privatelora.cli._daemons import num_threads_beside_another
from privatelora.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands to a program."""
    app.command(epilog=OVERHEAD_EXAMPLE)(overhead)
    app.command(epilog=TURNS_EXAMPLE)(turns)
    app.command(epilog=HTTP_EXAMPLE)(http)
    app.command(epilog=QUALITY_EXAMPLE)(quality)


OVERHEAD_EXAMPLE = "Example: privatelora-bench overhead --every 1,6 --json overhead.json"


def overhead(
    model: ModelOption = DEFAULT_MODEL,
    every: Annotated[
        str, typer.Option(help="Layers per exchange point, one arrangement after the other.")
    ] = "1,6",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each engine.")] = 7,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens counted in a run.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 64,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="Per process. [default: half the processors]")
    ] = None,
    json_file: JsonOption = None,
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
    with working() as (directory, report):
        result = measure_overhead(
            OverheadSettings(
                model=model,
                every=arrangements,
                rounds=rounds,
                tokens=tokens,
                prompt_tokens=prompt_tokens,
                num_threads=num_threads or num_threads_beside_another(),
                directory=directory,
            ),
            report,
        )
    finish(result, overhead_table(result), json_file)


TURNS_EXAMPLE = "Example: privatelora-bench turns --rtt-ms 0,20 --json turns.json"


def turns(
    model: ModelOption = DEFAULT_MODEL,
    every: EveryOption = 1,
    rtts_ms: RttOption = "0,20",
    history_tokens: Annotated[
        int, typer.Option("--history-tokens", min=16, help="Of the conversation so far, about.")
    ] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Of each.")] = 3,
    dtype: DtypeOption = FloatDtype.BFLOAT16,
    json_file: JsonOption = None,
) -> None:
    """Compare the second turn of a long conversation with a cold start."""
    from privatelora.benchmarks.serve import ServeSettings
    from privatelora.benchmarks.show import turns_table
    from privatelora.benchmarks.turns import TurnsSettings, measure_turns

    check_writable(json_file)
    distances = numbers("--rtt-ms", rtts_ms)
    with working() as (directory, report):
        serving = ServeSettings(
            model=model,
            every=every,
            rtts_ms=distances,
            prompt_tokens=2 * history_tokens,
            tokens=64,
            dtype=dtype.value,
            directory=directory,
        )
        result = measure_turns(TurnsSettings(serving, history_tokens, rounds), report)
    finish(result, turns_table(result), json_file)


HTTP_EXAMPLE = "Example: privatelora-bench http --rtt-ms 0,20 --json http.json"


def http(
    model: ModelOption = DEFAULT_MODEL,
    every: EveryOption = 1,
    rtts_ms: RttOption = "0",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 32,
    tokens: Annotated[int, typer.Option(min=8, help="Length of the answers.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Answers of each kind.")] = 7,
    dtype: DtypeOption = FloatDtype.BFLOAT16,
    json_file: JsonOption = None,
) -> None:
    """Compare answers over the edge's HTTP API with its generator in the same process."""
    from privatelora.benchmarks.http_overhead import HttpSettings, measure_http
    from privatelora.benchmarks.serve import ServeSettings
    from privatelora.benchmarks.show import http_table

    check_writable(json_file)
    distances = numbers("--rtt-ms", rtts_ms)
    with working() as (directory, report):
        serving = ServeSettings(
            model=model,
            every=every,
            rtts_ms=distances,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            dtype=dtype.value,
            directory=directory,
        )
        result = measure_http(HttpSettings(serving, rounds), report)
    finish(result, http_table(result), json_file)


QUALITY_EXAMPLE = "Example: privatelora-bench quality --codecs fp16,int8,int4 --json quality.json"


def quality(
    model: ModelOption = DEFAULT_MODEL,
    basis: Annotated[str, typer.Option(help="random or svd.")] = "random",
    every: EveryOption = 1,
    rank: Annotated[int, typer.Option(min=1, help="Of both directions.")] = 128,
    std: Annotated[float, typer.Option(min=0, help="Standard deviation of the random M.")] = 0.1,
    codecs: Annotated[
        str, typer.Option(help="Which ones. [default: all, without lz4]", show_default=False)
    ] = "",
    by_kind: Annotated[
        bool, typer.Option("--by-kind", help="Also each kind of tensor alone.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Text to run. [default: sampled from the model]")
    ] = None,
    num_sequences: Annotated[int, typer.Option("--sequences", min=1)] = 10,
    num_tokens: Annotated[int, typer.Option("--tokens", min=32, help="Of each sequence.")] = 256,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Compare payload codecs: bytes per token against the model's answers in fp32."""
    from privatelora.benchmarks.quality import QualitySettings, measure_quality
    from privatelora.benchmarks.show import check_plotting, quality_plot, quality_table
    from privatelora.runtime.payload.names import CODEC_NAMES, UNCOMPRESSED_NAMES

    check_writable(json_file)
    check_plotting(plot_file)
    check_writable(plot_file)
    names = tuple(name.strip() for name in codecs.split(",")) if codecs else UNCOMPRESSED_NAMES[1:]
    for name in names:
        if name not in CODEC_NAMES:
            raise ConfigError(f"--codecs {name!r}: choose from {', '.join(CODEC_NAMES)}")
    with working() as (directory, report):
        result = measure_quality(
            QualitySettings(
                model=model,
                basis=basis,
                every=every,
                rank=rank,
                std=std,
                codecs=names,
                by_kind=by_kind,
                text=text,
                num_sequences=num_sequences,
                num_tokens=num_tokens,
                directory=directory,
            ),
            report,
        )
    finish(result, quality_table(result), json_file)
    if plot_file is not None:
        quality_plot(result, plot_file)
