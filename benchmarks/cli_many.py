"""Commands that measure one cloud with many sessions."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from privatelora.benchmarks.options import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    EveryOption,
    FloatDtype,
    JsonOption,
    ModelOption,
    PlotOption,
    RttOption,
    SessionsOption,
    finish,
    numbers,
    progress,
    working,
)
from privatelora.cli._app import check_writable


def register(app: typer.Typer) -> None:
    """Add the commands to a program."""
    app.command(epilog=SERVE_EXAMPLE)(serve)
    app.command(epilog=SCHEDULING_EXAMPLE)(scheduling)
    app.command(epilog=SITUATIONS_EXAMPLE)(situations)
    app.command(epilog=LOAD_EXAMPLE)(load)


SERVE_EXAMPLE = (
    "Example: privatelora-bench serve --sessions 1,4,16 --rtt-ms 0,20 --json serve.json\n\n"
    "privatelora-bench serve --compare --sessions 1,8,16 --rtt-ms 20 --tokens 16 --plot serve.png"
)


def serve(
    model: ModelOption = DEFAULT_MODEL,
    every: EveryOption = 1,
    sessions: SessionsOption = "1,2,4,8,16,32",
    rtts_ms: RttOption = "0,20,80",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompts.")] = 32,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that each session decodes.")] = 48,
    dtype: DtypeOption = FloatDtype.BFLOAT16,
    device: DeviceOption = "cpu",
    num_edges: Annotated[int, typer.Option("--edges", min=1, help="Edge processes.")] = 2,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="With lockstep and with batches of whole steps too. In lockstep a token of all "
            "takes sessions x round trips x RTT.",
        ),
    ] = False,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Compare how many tokens one cloud gives many sessions at several distances."""
    from privatelora.benchmarks.serve import ServeSettings, measure_serving
    from privatelora.benchmarks.show import (
        check_plotting,
        serve_comparison_plot,
        serve_plot,
        serve_table,
    )

    check_writable(json_file)
    check_plotting(plot_file)
    check_writable(plot_file)
    counts = tuple(int(count) for count in numbers("--sessions", sessions))
    distances = numbers("--rtt-ms", rtts_ms)
    with working() as (directory, report):
        result = measure_serving(
            ServeSettings(
                model=model,
                every=every,
                sessions=counts,
                rtts_ms=distances,
                prompt_tokens=prompt_tokens,
                tokens=tokens,
                dtype=dtype.value,
                num_edges=num_edges,
                directory=directory,
                compare=compare,
                device=device,
            ),
            report,
        )
    finish(result, serve_table(result), json_file)
    if plot_file is not None:
        (serve_comparison_plot if compare else serve_plot)(result, plot_file)


SCHEDULING_EXAMPLE = "Example: privatelora-bench scheduling --sessions 8,64 --rtt-ms 0,20"


def scheduling(
    sessions: SessionsOption = "1,2,4,8,16,32,64",
    rtts_ms: RttOption = "0,5,20,80",
    num_segments: Annotated[
        int, typer.Option("--segments", min=1, help="Exchange points on the wire, and one.")
    ] = 30,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens that each session decodes.")] = 16,
    max_batch_rows: Annotated[int, typer.Option(min=2, help="Rows in a batch.")] = 128,
    json_file: JsonOption = None,
) -> None:
    """Compare the cloud's scheduling policies, in simulation."""
    from privatelora.benchmarks.scheduling import SchedulingSettings, measure_scheduling
    from privatelora.benchmarks.show import scheduling_table

    check_writable(json_file)
    settings = SchedulingSettings(
        num_sessions=tuple(int(count) for count in numbers("--sessions", sessions)),
        rtts_ms=numbers("--rtt-ms", rtts_ms),
        num_segments=num_segments,
        num_tokens=tokens,
        max_batch_rows=max_batch_rows,
    )
    with progress() as report:
        result = measure_scheduling(settings, report)
    finish(result, scheduling_table(result), json_file)


SITUATIONS_EXAMPLE = "Example: privatelora-bench situations --json situations.json"


def situations(
    model: ModelOption = DEFAULT_MODEL,
    every: EveryOption = 1,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that the others decode.")] = 48,
    dtype: DtypeOption = FloatDtype.BFLOAT16,
    json_file: JsonOption = None,
) -> None:
    """Measure what a far edge, a long prompt and another client's flood cost the others."""
    from privatelora.benchmarks.serve import ServeSettings
    from privatelora.benchmarks.show import situations_table
    from privatelora.benchmarks.situations import measure_situations

    check_writable(json_file)
    with working() as (directory, report):
        settings = ServeSettings(
            model=model,
            every=every,
            sessions=(16,),
            rtts_ms=(),
            prompt_tokens=32,
            tokens=tokens,
            dtype=dtype.value,
            num_edges=2,
            directory=directory,
        )
        result = measure_situations(settings, report)
    finish(result, situations_table(result), json_file)


class LoadTransport(StrEnum):
    """What the cloud listens with."""

    TCP = "tcp"
    TLS = "tls"


LOAD_EXAMPLE = (
    "Example: privatelora-bench load --rounds 5 --json load.json --plot load.png\n\n"
    "privatelora-bench load --transport tls --rate 200 --idle 200"
)


def load(
    model: ModelOption = DEFAULT_MODEL,
    every: EveryOption = 1,
    transport: Annotated[
        LoadTransport, typer.Option(help="What the cloud listens with.")
    ] = LoadTransport.TCP,
    attacks: Annotated[
        str | None, typer.Option(help="Some of the kinds, such as dropped,slow. Default: all.")
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions that decode all along.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of quiet, attack, control.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each phase.")] = 4.0,
    rate: Annotated[
        float, typer.Option(min=1.0, help="Connections per second opened and dropped.")
    ] = 500.0,
    num_idle: Annotated[
        int, typer.Option("--idle", min=1, help="Idle connections, half of them after a Hello.")
    ] = 400,
    num_slow: Annotated[
        int, typer.Option("--slow", min=1, help="Slow writers; as many ask and do not read.")
    ] = 100,
    dtype: DtypeOption = FloatDtype.BFLOAT16,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Measure what attacks on a cloud's port cost the sessions that work there.

    Connections opened and dropped, idle ones, slow writers and readers, one kind after the other
    and all together; each against quiet, and against the same attack on a process beside.
    """
    from privatelora.benchmarks.load import KINDS, LoadSettings, measure_load
    from privatelora.benchmarks.load_show import load_plot, load_table
    from privatelora.benchmarks.serve import ServeSettings
    from privatelora.benchmarks.show import check_plotting

    check_writable(json_file)
    check_plotting(plot_file)
    check_writable(plot_file)
    with working() as (directory, report):
        result = measure_load(
            LoadSettings(
                serving=ServeSettings(
                    model=model,
                    every=every,
                    sessions=(sessions,),
                    rtts_ms=(),
                    prompt_tokens=32,
                    tokens=128,
                    dtype=dtype.value,
                    directory=directory,
                ),
                transport=transport.value,
                kinds=KINDS[transport.value] if attacks is None else tuple(attacks.split(",")),
                rounds=rounds,
                seconds=seconds,
                rate=rate,
                num_idle=num_idle,
                num_slow=num_slow,
            ),
            report,
        )
    finish(result, load_table(result), json_file)
    if plot_file is not None:
        load_plot(result, plot_file)
