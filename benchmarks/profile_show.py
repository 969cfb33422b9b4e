"""Profiles as people look at them: a table, and a picture of one token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from privatelora.benchmarks.profile import CLOUD, NETWORK, PARTS
from privatelora.benchmarks.show import get_pyplot


def profile_table(result: dict[str, Any]) -> Table:
    """Of ``measure_profile``: a line for each part, a column for each distance."""
    rows = result["rows"]
    table = Table(title=f"Milliseconds of one token, {result['round_trips_per_token']} round trips")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(f"RTT {row['rtt_ms']:g} ms", justify="right")
    for name in PARTS:
        table.add_row(
            name,
            *(
                f"{row['parts_ms'][name]:.2f} ({row['parts_ms'][name] / row['token_ms']:.0%})"
                for row in rows
            ),
        )
    table.add_section()
    table.add_row("the token", *(f"{row['token_ms']:.2f}" for row in rows))
    return table


def profile_plot(result: dict[str, Any], file: Path) -> None:
    """One token at each distance: what each end did when."""
    pyplot = get_pyplot()
    rows = result["rows"]
    figure, panels = pyplot.subplots(len(rows), 1, figsize=(11, 0.8 + 1.7 * len(rows)))
    colors = {name: f"C{number}" for number, name in enumerate(PARTS)}
    for axes, row in zip([panels] if len(rows) == 1 else panels, rows, strict=True):
        axes.axvspan(0, row["example_ms"], color="0.93", label=NETWORK)
        for height, side in enumerate(("cloud", "edge")):
            for name, started, ended in row["example"][side]:
                part = CLOUD if side == "cloud" else name
                axes.broken_barh(
                    [(started, ended - started)],
                    (height - 0.35, 0.7),
                    color=colors[part],
                    label=part,
                )
        axes.set_xlim(0, row["example_ms"])
        axes.set_yticks([0, 1], ["cloud", "edge"])
        axes.set_title(f"RTT {row['rtt_ms']:g} ms", fontsize=10, loc="left")
    axes.set_xlabel("ms of one token; grey: neither does anything, the network does")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="upper center", ncol=len(handles), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
