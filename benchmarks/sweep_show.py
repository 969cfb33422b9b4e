"""Sweeps and comparisons of results as people look at them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from privatelora.benchmarks.result import Change
from privatelora.benchmarks.show import get_pyplot, spread


def sweep_table(result: dict[str, Any]) -> Table:
    """Of ``measure_sweep``: a line for each thing measured."""
    rounds = result["settings"]["rounds"]
    title = "Tokens/s" if rounds == 1 else f"Tokens/s, median (min-max) of {rounds} rounds"
    if errors := result["prediction"]:
        title += f"; predictions off by {errors['median_error']:.1%} at the median, "
        title += f"{errors['worst_error']:.1%} at worst"
    stolen = max((row["stolen"]["max"] for row in result["rows"] if "stolen" in row), default=0.0)
    title += f"; its host took {stolen:.0%} of the processors' time at most"
    missing = "; ".join(f"{name} is missing: {why}" for name, why in result["missing"].items())
    table = Table(title=title, caption=missing or None)
    headings = ("link", "", "payload", "sessions", "tokens/s", "/ published", "predicted", "/ it")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    label = None
    for row in result["rows"]:
        link = row.get("link", "alone")
        if link != label:
            table.add_section()
        name = row.get("arrangement", row.get("baseline", ""))
        through = row.get("transport", "tcp")
        predicted, ratio = row.get("predicted_tokens_per_s"), row.get("predicted_vs_measured")
        gained = row.get("vs_published")
        table.add_row(
            link if link != label else "",
            name if through == "tcp" else f"{name} ({through})",
            row.get("payload", ""),
            str(row["sessions"]),
            spread(row["tokens_per_s"]),
            "" if gained is None else spread(gained),
            "" if predicted is None else f"{predicted['median']:.3g}",
            "" if ratio is None else spread(ratio),
        )
        label = link
    return table


def sweep_plot(result: dict[str, Any], file: Path) -> None:
    """Measured tokens/s as points with their spread, predicted as lines.

    Links that differ in their round trip alone make a panel, so do those that differ in bandwidth
    alone; where these do not have all links, there is one panel of the links by name.
    """
    pyplot = get_pyplot()
    panels = panels_of(result["links"])
    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(1 + 6.5 * len(panels), 6), sharey=True, squeeze=False
    )
    for axes, (label, key, places) in zip(all_axes[0], panels, strict=True):
        _draw(axes, result, key, places)
        axes.set_xlabel(label)
    all_axes[0][0].set_ylabel("tokens/s (points: measured, lines: predicted)")
    all_axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


Panel = tuple[str, str, dict[str, float]]
"""Its axis' label and key, and where each link stands on it."""


def panels_of(links: dict[str, dict[str, Any]]) -> list[Panel]:
    """Which links stand beside each other, and where; every link is in one at least."""
    panels: list[Panel] = []
    for key, fixed, label in (
        ("rtt_ms", ("up_mbps", "down_mbps"), "round trip time, ms"),
        ("up_mbps", ("rtt_ms",), "bandwidth up, Mbps"),
    ):
        groups: dict[tuple[Any, ...], dict[str, float]] = {}
        for name, link in links.items():
            if link[key] is not None:
                same = tuple(link[other] for other in fixed)
                groups.setdefault(same, {})[name] = link[key]
        same, places = max(groups.items(), key=lambda item: len(item[1]), default=((), {}))
        if len(places) > 2:
            panels.append((label + _at(key, same), key, places))
    if links.keys() == {name for *_, places in panels for name in places}:
        return panels
    return [("", "name", {name: float(number) for number, name in enumerate(links)})]


def _at(key: str, same: tuple[Any, ...]) -> str:
    if key == "up_mbps":
        return f" (at {same[0]:g} ms)"
    up, down = same
    if up is None:
        return ""
    return f" (at {up:g} Mbps)" if up == down else f" (at {up:g}/{down:g} Mbps)"


def _draw(axes: Any, result: dict[str, Any], key: str, places: dict[str, float]) -> None:
    if key == "name":
        axes.set_xticks(list(places.values()), list(places), rotation=30, ha="right")
    else:
        low = min((place for place in places.values() if place > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=low) if key == "rtt_ms" else axes.set_xscale("log")
        axes.set_xticks(sorted(places.values()), [f"{x:g}" for x in sorted(places.values())])
        axes.minorticks_off()
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.2)
    for index, (name, rows) in enumerate(_lines(result["rows"]).items()):
        color, baseline = f"C{index % 10}", "baseline" in rows[0]
        if "link" not in rows[0]:
            axes.axhline(rows[0]["tokens_per_s"]["median"], color=color, ls=":", label=name)
            continue
        here = [row for row in rows if row["link"] in places]
        here.sort(key=lambda row: places[row["link"]])
        xs = [places[row["link"]] for row in here]
        rates = [row["tokens_per_s"] for row in here]
        middles = [rate["median"] for rate in rates]
        below = [rate["median"] - rate["min"] for rate in rates]
        above = [rate["max"] - rate["median"] for rate in rates]
        axes.errorbar(
            xs,
            middles,
            yerr=(below, above),
            fmt="x" if baseline else "o",
            ms=5,
            color=color,
            label=name,
        )
        predicted = [row["predicted_tokens_per_s"]["median"] for row in here]
        axes.plot(xs, predicted, "--" if baseline else "-", color=color, lw=1, alpha=0.7)


def _lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that differ in their link alone."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "baseline" in row:
            name = f"{row['baseline']} (alone)" if "link" not in row else row["baseline"]
        else:
            many = f", {row['sessions']} sessions" if row["sessions"] > 1 else ""
            through = "" if row["transport"] == "tcp" else f", {row['transport']}"
            name = f"{row['arrangement']}, {row['payload']}{many}{through}"
        lines.setdefault(name, []).append(row)
    return lines


def changes_table(changes: Sequence[Change], names: tuple[str, str]) -> Table:
    """Of ``compare``: a line for each figure that both have."""
    table = Table(title=f"{names[1]} against {names[0]}")
    for heading in ("", "figure", *names, "second / first", "spreads"):
        table.add_column(heading)
    for change in changes:
        table.add_row(
            change.about,
            change.figure,
            f"{change.first:.4g}",
            f"{change.second:.4g}",
            f"{change.ratio:.3f}",
            {None: "", True: "overlap", False: "apart"}[change.is_within],
        )
    return table
