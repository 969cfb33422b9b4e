"""How fast training is, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from privatelora.benchmarks.show import get_pyplot, spread


def training_speed_table(result: dict[str, Any]) -> Table:
    """Of ``measure_training_speed``."""
    settings = result["settings"]
    table = Table(
        title=f"Training with batches of {settings['batch_size']} x {settings['tokens']} tokens, "
        f"median (min-max); the ratio is to {result['baseline']}. A step's round trips and MB to "
        f"the cloud + back. Memory at most, trainer + cloud; both have {settings['num_threads']} "
        "threads each"
    )
    headings = ("tokens/s", "ratio", "trained, M", "trips", "MB", "memory, MiB")
    table.add_column("method")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for row in result["rows"]:
        nbytes, memory = row["bytes_per_step"], row["peak_memory_mib"]
        table.add_row(
            _title(row),
            spread(row["tokens_per_s"]),
            spread(row["ratio"]),
            f"{row['trainable_parameters'] / 1e6:.2f}",
            str(row["round_trips_per_step"] or ""),
            " + ".join(f"{nbytes[way] / 1e6:.1f}" for way in ("up", "down") if nbytes[way]),
            " + ".join(f"{memory[process]:,.0f}" for process in memory),
        )
    return table


def training_speed_plot(result: dict[str, Any], file: Path) -> None:
    """Bars of tokens/s, with lines from the smallest to the largest."""
    pyplot = get_pyplot()
    rows = result["rows"]
    names = [_title(row) for row in rows]
    rates = [row["tokens_per_s"] for row in rows]
    medians = [rate["median"] for rate in rates]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.5))
    axes.barh(
        names, medians, color=["tab:blue" if row["mode"] == "split" else "0.7" for row in rows]
    )
    axes.errorbar(
        medians,
        names,
        xerr=[
            [rate["median"] - rate["min"] for rate in rates],
            [rate["max"] - rate["median"] for rate in rates],
        ],
        fmt="none",
        ecolor="black",
        capsize=3,
    )
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s of training: median, line from smallest to largest")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _title(row: dict[str, Any]) -> str:
    where = f", split, {row['rtt_ms']:g} ms" if row["mode"] == "split" else ""
    return f"{row['method']}{where}"
