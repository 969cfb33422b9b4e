"""Commands that measure connections."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from privatelora.benchmarks.options import (
    JsonOption,
    PlotOption,
    finish,
    numbers,
    working,
)
from privatelora.cli._app import check_writable


def register(app: typer.Typer) -> None:
    """Add the commands to a program."""
    app.command(epilog=TRANSPORT_EXAMPLE)(transport)
    app.command(epilog=EMULATOR_EXAMPLE)(emulator)


TRANSPORT_EXAMPLE = "Example: privatelora-bench transport --json transport.json --plot out.png"


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
    with working() as (directory, report):
        result = measure_transports(
            TransportSettings(names, rounds, round_trips, frame_nbytes, spin_us, directory),
            report,
        )
    for name, reason in result["unavailable"].items():
        Console(stderr=True).print(f"{name} was left out: {reason}")
    finish(result, transport_table(result), json_file)
    if plot_file is not None:
        transport_plot(result, plot_file)


EMULATOR_EXAMPLE = "Example: privatelora-bench emulator --rtt-ms 5,20 --mbps 10,100"


def emulator(
    rtts_ms: Annotated[str, typer.Option("--rtt-ms", help="Round trip times to set.")] = (
        "0,1,5,20,80,200"
    ),
    mbps: Annotated[str, typer.Option(help="Bandwidths to set.")] = "0.5,2,10,50,100,1000",
    kernel: Annotated[
        bool,
        typer.Option(
            "--kernel", help="Beside links that the kernel shapes, in namespaces; needs root."
        ),
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Check impaired connections: the delay and bandwidth measured against those set."""
    from privatelora.benchmarks.emulator import EmulatorSettings, measure_emulator
    from privatelora.benchmarks.show import emulator_table

    check_writable(json_file)
    delays, bandwidths = numbers("--rtt-ms", rtts_ms), numbers("--mbps", mbps)
    with working() as (directory, report):
        settings = EmulatorSettings(delays, bandwidths, directory, kernel)
        result = measure_emulator(settings, report)
    for name, reason in result.get("missing", {}).items():
        Console(stderr=True).print(f"the kernel's {name} are left out: {reason}")
    finish(result, emulator_table(result), json_file)
