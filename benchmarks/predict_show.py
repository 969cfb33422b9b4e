"""Predictions as people look at them: tables in the terminal and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from privatelora.benchmarks.predict import predict
from privatelora.benchmarks.predict_hardware import Link
from privatelora.benchmarks.predict_paper import RANK, paper_time, published, sent_time
from privatelora.benchmarks.predict_terms import Scenario
from privatelora.benchmarks.show import get_pyplot

Curve = tuple[str, Callable[[Link], float]]
"""A name and tokens/s over a link."""

_RTTS_MS = [0.1 * 10 ** (step / 12) for step in range(42)]
_MBPS = [0.3 * 10 ** (step / 12) for step in range(43)]


def paper_table_view(result: dict[str, Any]) -> Table:
    """Of ``paper_table``: a line for each size and way, a column for each round trip time."""
    rtts = [f"{rtt_ms:g}" for rtt_ms in result["rtts_ms"]]
    table = Table(
        title="The paper's speeds, tokens/s of one session, recomputed from its inputs at 60/100 "
        "Mbps; and with (1 + P) round trips of 1 to 80 ms"
    )
    headings = ("model", "", "trips", "bytes", "paper", "formula", "off by")
    for heading in (*headings, *(f"{rtt} ms" for rtt in rtts[1:])):
        table.add_column(heading, no_wrap=True)
    label = ""
    for row in result["rows"]:
        if row["model"] != label:
            table.add_section()
        said, rates = row.get("published_tokens_per_s"), row.get("by_rtt_ms", {})
        table.add_row(
            row["model"] if row["model"] != label else "",
            row["way"],
            str(row.get("round_trips_per_token", "")),
            f"{row['nbytes_per_token']:,}" if "nbytes_per_token" in row else "",
            "" if said is None else f"{said:.1f}",
            f"{rates['0']:.1f}" if rates else "input",
            f"{row['deviation']:+.1%}" if "deviation" in row else "",
            *(f"{rates[rtt]:.2f}" if rates else "" for rtt in rtts[1:]),
        )
        label = row["model"]
    return table


def predictions_table(result: dict[str, Any]) -> Table:
    """Of ``cli_predict``: a line for each arrangement, codec, link and number of sessions."""
    table = Table(
        title=f"{result['model']}, cloud {result['cloud']['name']}, edge "
        f"{result['edge']['name']}: where the milliseconds of a token go, and tokens/s of one "
        "session and of N"
    )
    headings = ("every", "link", "trips", "bytes", "cloud", "edge", "sending", "RTT")
    for heading in (*headings, "tokens/s", "N: all", "first, s"):
        table.add_column(heading, no_wrap=True)
    for row in result["rows"]:
        parts = row["parts"]
        at_edge = ("edge_layers_ms", "exchange_ms", "lm_head_ms", "codec_ms", "waking_ms")
        table.add_row(
            f"{row['arrangement'].removeprefix('every ')}, {row['codec']}",
            row["link_text"],
            str(row["round_trips_per_token"]),
            f"{row['up_nbytes'] + row['down_nbytes']:,}",
            f"{parts['cloud_ms'] - parts['meanwhile_ms']:.3g}",
            f"{sum(parts[name] for name in at_edge):.3g}",
            f"{parts['up_ms'] + parts['down_ms']:.3g}",
            f"{parts['round_trips_ms']:.3g}",
            f"{row['tokens_per_s']:.3g}",
            f"{row['sessions']}: {row['aggregate_tokens_per_s']:.3g}",
            f"{row['first_token_s']:.3g}",
        )
    return table


def paper_curves() -> list[Curve]:
    """The 7B model as the paper has it, per layer and grouped."""
    model = published()[0]

    def sent(every: int) -> Callable[[Link], float]:
        plan = model.shape.plan(every, RANK, RANK)
        return lambda link: 1 / sent_time(model, plan, link).total_s

    return [
        ("7B, paper's count", lambda link: 1 / paper_time(model, RANK, link).total_s),
        *((f"7B, q k v, every {every}", sent(every)) for every in (1, 8, 16, 32)),
    ]


def scenario_curves(scenarios: Sequence[tuple[str, Scenario]]) -> list[Curve]:
    """One line for each scenario, whose own link does not matter."""

    def curve(scenario: Scenario) -> Callable[[Link], float]:
        return lambda link: predict(replace(scenario, link=link)).tokens_per_s

    return [(name, curve(scenario)) for name, scenario in scenarios]


def predictions_plot(curves: Sequence[Curve], base: Link, file: Path) -> None:
    """Tokens/s of one session against the round trip time, and against bandwidth.

    The left panel has the bandwidths of ``base``, the right its round trip time, or 20 ms if it
    has none, with the same bandwidth in both directions.
    """
    pyplot = get_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    rtt_s = base.rtt_s or 20e-3
    for name, rate in curves:
        left.plot(
            _RTTS_MS, [rate(replace(base, rtt_s=rtt_ms / 1e3)) for rtt_ms in _RTTS_MS], label=name
        )
        right.plot(_MBPS, [rate(Link(rtt_s, mbps * 1e6, mbps * 1e6)) for mbps in _MBPS])
    left.set_xlabel("round trip time, ms" + str(base).partition(" ms")[2])
    right.set_xlabel(f"bandwidth each way, Mbps (round trip {rtt_s * 1e3:g} ms)")
    left.set_ylabel("tokens/s of one session, predicted")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
