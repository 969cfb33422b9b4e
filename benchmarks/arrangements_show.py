"""The table of arrangements, and accuracy against round trips as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from privatelora.benchmarks.show import get_pyplot


def arrangements_table(result: dict[str, Any]) -> Table:
    """Of ``measure_arrangements``: a line for each method, a column for each task."""
    link = result["link"]
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    table = Table(
        title=f"After {result['settings']['steps']} steps; right answers to held-out questions "
        "with 95 % intervals; tokens/s are predicted for "
        f"{link['rtt_ms']:g} ms and {link['mbps']:g} Mbps"
    )
    for heading in (
        "method",
        *tasks,
        "as the base model",
        "KL",
        "trained",
        "round trips",
        "bytes",
        "tokens/s",
        "rate",
    ):
        table.add_column(heading, no_wrap=True)
    for lines in _by_method(result).values():
        first = next(iter(lines.values()))
        table.add_row(
            first["method"],
            *(_accuracy(lines.get(task)) for task in tasks),
            f"{first['retention']:.1%}",
            f"{first['kl_to_base']:.3f}",
            f"{first['trainable_parameters']:,}",
            str(first["round_trips_per_token"]),
            f"{first['bytes_per_token']:,}",
            f"{first['predicted_tokens_per_s']:.2g}",
            "" if first["learning_rate"] is None else f"{first['learning_rate']:g}",
        )
    return table


def arrangements_plot(result: dict[str, Any], file: Path) -> None:
    """Accuracy, and agreement with the base model, against round trips: a panel for each."""
    pyplot = get_pyplot()
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    figure, panels = pyplot.subplots(1, len(tasks) + 1, figsize=(5 * len(tasks) + 5, 4.8))
    series = {
        "grouped, equal rank": ("o", "C0"),
        "grouped, equal parameters": ("s", "C1"),
        "grouped, rank 128": ("P", "C5"),
        "per layer": ("D", "C2"),
        "LoRA": ("^", "C3"),
        "full": ("v", "C4"),
        "base": ("x", "0.3"),
    }
    for axes, task in zip(panels, [*tasks, None], strict=True):
        for name, (marker, colour) in series.items():
            rows = [
                row
                for row in result["rows"]
                if _series(row["row"]) == name and row["task"] == (task or tasks[0])
            ]
            if not rows:
                continue
            rows.sort(key=lambda row: row["round_trips_per_token"])
            x = [max(row["round_trips_per_token"], 0.7) for row in rows]
            keys = ("accuracy", "ci_low", "ci_high")
            if task is None:
                keys = ("retention", "retention_low", "retention_high")
            y, low, high = ([row[key] for row in rows] for key in keys)
            below = [max(0.0, a - b) for a, b in zip(y, low, strict=True)]
            above = [max(0.0, b - a) for a, b in zip(y, high, strict=True)]
            axes.errorbar(
                x,
                y,
                yerr=(below, above),
                fmt=marker + ("-" if "grouped" in name else ""),
                color=colour,
                capsize=2,
                label=name,
                alpha=0.85,
            )
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 15, 30, 120], ["1", "2", "5", "15", "30", "120"])
        axes.minorticks_off()
        axes.set_xlabel("round trips per token (left edge: none)")
        axes.set_ylim(-0.03, 1.03)
        axes.set_title("general text, as the base model" if task is None else f"{task}, right")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _by_method(result: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["row"], {})[row["task"]] = row
    return found


def _accuracy(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['accuracy']:.2f} ({row['ci_low']:.2f}-{row['ci_high']:.2f})"


def _series(name: str) -> str:
    if name.startswith("every-"):
        if name.endswith("-128"):
            return "grouped, rank 128"
        kind = "rank" if name.endswith("rank") else "parameters"
        return f"grouped, equal {kind}"
    for prefix, series in (("per-layer", "per layer"), ("lora", "LoRA")):
        if name.startswith(prefix):
            return series
    return name
