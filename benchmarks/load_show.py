"""The result of ``privatelora-bench load`` as people look at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from privatelora.benchmarks.show import get_pyplot, spread


def load_table(result: dict[str, Any]) -> Table:
    """Of ``measure_load``."""
    settings, before, after = result["settings"], result["cloud_before"], result["cloud_after"]
    table = Table(
        title=f"{settings['sessions']} sessions decode while {settings['transport']}:// is "
        f"attacked in {settings['rounds']} rounds of {settings['seconds']:g} s, median (min-max). "
        f"The cloud took {before['rss_mib']:.0f} MiB and {before['descriptors']} descriptors "
        f"before, {after['rss_mib']:.0f} MiB and {after['descriptors']} after"
    )
    rows = result["rows"]
    for heading in ("under attack", *(row["attack"] for row in rows)):
        table.add_column(heading, no_wrap=heading == "under attack")

    def line(label: str, cell: Callable[[dict[str, Any]], str], *, section: bool = False) -> None:
        table.add_row(label, *map(cell, rows), end_section=section)

    line("tokens/s, quiet", lambda row: spread(row["tokens_per_s"]["quiet"]))
    line("share of it", lambda row: spread(row["vs_quiet"]))
    line("share of control", lambda row: spread(row["vs_control"]))
    line("control / quiet", lambda row: spread(row["control_vs_quiet"]))
    line(
        "largest gap, ms (quiet)",
        lambda row: "{attack:.0f} ({quiet:.0f})".format_map(row["largest_gap_ms"]),
        section=True,
    )
    line("connections opened", lambda row: str(row["connections"]["opened"]))
    line("refused", lambda row: str(row["connections"]["refused"]))
    line("dropped by the cloud", lambda row: str(row["connections"]["dropped_by_listener"]))
    line("cloud's CPU, ms a token", lambda row: spread(row["cloud_cpu_ms_per_token"]["attack"]))
    line("the same, quiet", lambda row: spread(row["cloud_cpu_ms_per_token"]["quiet"]))
    line("attacker's CPU, of a core", lambda row: f"{row['cpu_share']['attack']['attacker']:.0%}")
    line("cloud's peak, MiB", lambda row: f"{row['cloud_rss_mib_peak']:.0f}")
    line("descriptors", lambda row: str(row["cloud_descriptors_peak"]))
    line("lines in its log", lambda row: str(row["lines_logged"]))
    return table


def load_plot(result: dict[str, Any], file: Path) -> None:
    """Tokens/s under each attack, of quiet and of control: median, and from least to most."""
    pyplot = get_pyplot()
    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for index, (name, label) in enumerate((("vs_quiet", "of quiet"), ("vs_control", "of control"))):
        figures = [row[name] for row in rows]
        medians = [figure["median"] for figure in figures]
        axes.errorbar(
            [place + 0.12 * (2 * index - 1) for place in range(len(rows))],
            medians,
            [
                [figure["median"] - figure["min"] for figure in figures],
                [figure["max"] - figure["median"] for figure in figures],
            ],
            fmt="o",
            capsize=4,
            label=label,
        )
    axes.axhline(0.9, color="0.4", linestyle="--", label="bound")
    axes.axhline(1.0, color="0.8")
    axes.set_xticks(range(len(rows)), [row["attack"] for row in rows])
    axes.set_ylabel("tokens/s of the working sessions, as a share")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
