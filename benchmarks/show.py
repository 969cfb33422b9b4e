"""Results as people look at them: tables in the terminal and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from privatelora.errors import ConfigError


def spread(figure: dict[str, Any]) -> str:
    """``median (min-max)``, or the only value there is."""
    if figure["min"] == figure["max"]:
        return f"{figure['median']:.3g}"
    return f"{figure['median']:.3g} ({figure['min']:.3g}-{figure['max']:.3g})"


def overhead_table(result: dict[str, Any]) -> Table:
    """Of ``measure_overhead``."""
    table = Table(
        title="Decoding, median (min-max); threads are per process, and split is two of them"
    )
    for heading in ("round trips", "engine", "threads", "dtype", "tokens/s", "split / it"):
        table.add_column(heading, no_wrap=True)
    for arrangement in result["arrangements"]:
        label = str(arrangement["round_trips_per_token"])
        for row in arrangement["rows"]:
            ratio = arrangement.get(f"split_vs_{row['engine']}")
            table.add_row(
                label,
                row["engine"].removesuffix("_all_cpus"),
                str(row["num_threads"]),
                row["dtype"],
                spread(row["tokens_per_s"]),
                "" if ratio is None else spread(ratio),
            )
            label = ""
    return table


def serve_table(result: dict[str, Any]) -> Table:
    """Of ``measure_serving``."""
    table = Table(
        title=f"Sessions on one cloud, {result['round_trips_per_token']} round trips per token"
    )
    compares = result["settings"]["compare"]
    headings = ("tokens/s", "each", "ms/token p50", "p99", "of roofline")
    for heading in ("RTT", "sessions", *(("scheduling",) if compares else ()), *headings):
        table.add_column(heading, no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            f"{row['rtt_ms']:g} ms",
            str(row["sessions"]),
            *((row["scheduling"],) if compares else ()),
            f"{row['aggregate_tokens_per_s']:.1f}",
            f"{row['session_tokens_per_s']:.2f}",
            f"{row['time_per_token_ms_p50']:.1f}",
            f"{row['time_per_token_ms_p99']:.1f}",
            f"{row['vs_roofline']:.2f}",
        )
    return table


def serve_plot(result: dict[str, Any], file: Path) -> None:
    """Aggregate tokens/s against sessions, a line for each distance, with its roofline."""
    pyplot = get_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for index, rtt_ms in enumerate(sorted({row["rtt_ms"] for row in result["rows"]})):
        rows = [row for row in result["rows"] if row["rtt_ms"] == rtt_ms]
        sessions = [row["sessions"] for row in rows]
        measured = [row["aggregate_tokens_per_s"] for row in rows]
        roofline = [row["roofline_tokens_per_s"] for row in rows]
        axes.plot(sessions, measured, "o-", color=f"C{index}", label=f"RTT {rtt_ms:g} ms")
        if rtt_ms:
            axes.plot(sessions, roofline, "--", color=f"C{index}", alpha=0.5)
    _scale_by_sessions(axes, sessions)
    axes.set_ylabel("tokens/s of all sessions together (dashed: roofline)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _scale_by_sessions(axes: Any, sessions: list[int]) -> None:
    """Both axes in powers, labelled with plain numbers."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sessions, [str(number) for number in sessions])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("sessions")


def serve_comparison_plot(result: dict[str, Any], file: Path) -> None:
    """Aggregate tokens/s against sessions: a panel for each distance, a line for each way."""
    pyplot = get_pyplot()
    rtts_ms = sorted({row["rtt_ms"] for row in result["rows"]})
    figure, panels = pyplot.subplots(
        1, len(rtts_ms), figsize=(1 + 4 * len(rtts_ms), 4.5), sharey=True, squeeze=False
    )
    for axes, rtt_ms in zip(panels[0], rtts_ms, strict=True):
        ways: dict[str, list[dict[str, Any]]] = {}
        for row in result["rows"]:
            if row["rtt_ms"] == rtt_ms:
                ways.setdefault(row["scheduling"], []).append(row)
        for way, rows in ways.items():
            sessions = [row["sessions"] for row in rows]
            axes.plot(sessions, [row["aggregate_tokens_per_s"] for row in rows], "o-", label=way)
        roofline = [row["roofline_tokens_per_s"] for row in rows]
        axes.plot(sessions, roofline, "--", color="0.4", label="roofline")
        axes.set_title(f"RTT {rtt_ms:g} ms")
        _scale_by_sessions(axes, sessions)
    panels[0][0].set_ylabel("tokens/s of all sessions together")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def scheduling_table(result: dict[str, Any]) -> Table:
    """Of ``measure_scheduling``: what depends on sessions and distance."""
    settings = result["settings"]
    costs = {row["sessions"]: row["us_per_step"] for row in result["cost_rows"]}
    table = Table(
        title=f"Decoding over {settings['num_segments']} segments, simulated; scheduling takes "
        + ", ".join(f"{us:.1f} us a step for {sessions}" for sessions, us in costs.items())
        + " sessions"
    )
    headings = (
        *("RTT", "sessions", "policy", "tokens/s", "of roofline"),
        *("ms/token p50", "p99", "largest", "fairness", "rows"),
    )
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            f"{row['rtt_ms']:g} ms",
            str(row["sessions"]),
            row["policy"],
            f"{row['aggregate_tokens_per_s']:.1f}",
            f"{row['vs_roofline']:.2f}",
            f"{row['time_per_token_ms_p50']:.0f}",
            f"{row['time_per_token_ms_p99']:.0f}",
            f"{row['largest_gap_ms']:.0f}",
            f"{row['fairness']:.3f}",
            f"{row['mean_batch_rows']:.1f}",
        )
    return table


def situations_table(result: dict[str, Any]) -> Table:
    """Of ``measure_situations``."""
    table = Table(title="What single sessions cost the others")
    for heading in ("situation", "figure", "value"):
        table.add_column(heading, no_wrap=True)
    for name, figures in result["straggler"].items():
        rate = figures["aggregate_tokens_per_s"]
        table.add_row(name.replace("_", " "), "tokens/s of the other 15", f"{rate:.2f}")
    for name, figures in result["long_prompt"].items():
        label = f"long prompt in {name}"
        table.add_row(label, "its first token after", f"{figures['time_to_first_token_s']:.2f} s")
        for when in ("before", "after"):
            gap = figures[f"largest_gap_{when}_ms"]
            table.add_row("", f"largest gap of the others, {when}", f"{gap:.0f} ms")
    alone = result["first_token"]
    table.add_row(
        "the same alone at 20 ms", "first token after", f"{spread(alone['pipelined_s'])} s"
    )
    table.add_row("", "chunk by chunk in lockstep", f"{spread(alone['lockstep_s'])} s")
    table.add_row("", "faster", f"{spread(alone['ratio'])} x")
    flood = result["flood"]
    for when in ("alone", "during"):
        rate = flood[f"{when}_tokens_per_s"]
        label = "flood by another client" if when == "alone" else ""
        table.add_row(label, f"tokens/s of one session, {when}", f"{rate:.2f}")
    table.add_row("", f"of its rate alone (fair: {flood['fair_share']})", f"{flood['ratio']:.2f}")
    return table


def transport_table(result: dict[str, Any]) -> Table:
    """Of ``measure_transports``."""
    settings = result["settings"]
    table = Table(
        title=f"Round trips of {settings['frame_nbytes']} bytes in us, and MiB/s each way in "
        f"frames of {settings['large_frame_nbytes'] >> 20} MiB; ratios are median (min-max)"
    )
    for heading in ("transport", "p50", "p99", "p50 / bare", "p50 / tcp", "MiB/s", "MiB/s / bare"):
        table.add_column(heading, no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["transport"],
            f"{row['rtt_us_p50']:.1f}",
            f"{row['rtt_us_p99']:.1f}",
            *(
                spread(row[name]) if name in row else ""
                for name in ("vs_bare_p50_spread", "vs_tcp_p50")
            ),
            f"{row['large_mib_per_s']:.0f}",
            spread(row["large_vs_bare"]) if "large_vs_bare" in row else "",
        )
    return table


def transport_plot(result: dict[str, Any], file: Path) -> None:
    """Bars of p50 with p99 as whiskers, and of throughput."""
    pyplot = get_pyplot()
    rows = result["rows"]
    names = [row["transport"] for row in rows]
    colours = ["0.7" if "bare" in name else "tab:blue" for name in names]
    p50 = [row["rtt_us_p50"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.5 * len(rows) + 1.5), sharey=True)
    left.barh(names, p50, color=colours)
    left.errorbar(
        p50,
        names,
        xerr=[[0.0] * len(rows), [row["rtt_us_p99"] - row["rtt_us_p50"] for row in rows]],
        fmt="none",
        ecolor="black",
        capsize=3,
    )
    left.set_xlabel(
        f"round trip of {result['settings']['frame_nbytes']} bytes, us: p50, line to p99"
    )
    left.invert_yaxis()
    right.barh(names, [row["large_mib_per_s"] for row in rows], color=colours)
    right.set_xlabel("8 MiB frames, MiB/s each way")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def emulator_table(result: dict[str, Any]) -> Table:
    """Of ``measure_emulator``."""
    table = Table(title=f"Impaired TCP, frames of {result['frame_nbytes']} bytes and more")
    for heading in ("set", "measured", "p99", "off by"):
        table.add_column(heading, no_wrap=True)
    for row in result["rtt_rows"]:
        table.add_row(
            f"{row['set_rtt_ms']:g} ms",
            f"{row['rtt_ms_p50']:.2f} ms",
            f"{row['rtt_ms_p99']:.2f} ms",
            f"{row['rtt_ms_p50'] - row['set_rtt_ms']:+.2f} ms",
        )
    for row in result["bandwidth_rows"]:
        table.add_row(
            f"{row['set_mbps']:g} Mbps {row['direction']}",
            f"{row['mbps']:.4g} Mbps",
            "",
            f"{row['ratio'] - 1:+.1%}",
        )
    if "kernel_rtt_rows" in result:
        table.add_section()
    for row in result.get("kernel_rtt_rows", ()):
        table.add_row(
            f"{row['set_rtt_ms']:g} ms, kernel",
            f"{row['kernel_rtt_ms']:.2f} ms",
            "",
            f"{row['kernel_rtt_ms'] - row['set_rtt_ms']:+.2f} ms",
        )
    for row in result.get("kernel_bandwidth_rows", ()):
        table.add_row(
            f"{row['set_mbps']:g} Mbps, kernel",
            f"{row['kernel_mbps']:.4g} Mbps",
            "",
            f"{row['kernel_ratio'] - 1:+.1%} of its payload",
        )
    return table


def turns_table(result: dict[str, Any]) -> Table:
    """Of ``measure_turns``."""
    tokens = result["settings"]["history_tokens"]
    table = Table(title=f"Second turn after about {tokens} tokens, and the same from a cold start")
    for heading in ("RTT", "", "tokens run", "bytes to the cloud", "first token after", "faster"):
        table.add_column(heading, no_wrap=True)
    for row in result["rows"]:
        for name in ("cold_start", "second_turn"):
            figures = row[name]
            table.add_row(
                f"{row['rtt_ms']:g} ms",
                name.replace("_", " "),
                str(figures["tokens_run"]),
                f"{figures['bytes_to_cloud']:,}",
                f"{spread(figures['time_to_first_token_s'])} s",
                spread(row["speedup"]) + " x" if name == "second_turn" else "",
            )
    return table


def http_table(result: dict[str, Any]) -> Table:
    """Of ``measure_http``."""
    table = Table(title="The same edge's answers over HTTP and without it, median (min-max)")
    for heading in ("RTT", "", "tokens/s", "first token after", "of the generator"):
        table.add_column(heading, no_wrap=True)
    for row in result["rows"]:
        for name, label in (("direct", "generator"), ("http", "HTTP")):
            figures = row[name]
            table.add_row(
                f"{row['rtt_ms']:g} ms",
                label,
                spread(figures["tokens_per_s"]),
                f"{spread(figures['time_to_first_token_s'])} s",
                spread(row["ratio"]) if name == "http" else "",
            )
    return table


def quality_table(result: dict[str, Any]) -> Table:
    """Of ``measure_quality``."""
    base, settings = result["base_model"], result["settings"]
    shapes = {"7B per layer": "per layer, rank 128", "7B grouped": "every 8, rank 32"}
    table = Table(
        title=f"Against fp32 over {base['positions']} positions; bytes of a token both ways. The "
        f"adapter (std {settings['adapter_std']}) changes {1 - base['top1_agreement']:.0%} of the "
        f"base model's choices. 7B: how many bytes fewer than full hidden states"
    )
    headings = ("codec", "direction", "bytes", "KL", "top-1", "perplexity", *shapes)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["codec"],
            row["direction"],
            f"{row['bytes_per_token']:.0f}",
            f"{row['kl']:.2e}",
            f"{row['top1_agreement']:.2%}",
            f"{row['perplexity']:.3f}",
            *(f"{row['7b'][shape]['fewer']:.2%}" for shape in shapes.values()),
        )
    return table


def quality_plot(result: dict[str, Any], file: Path) -> None:
    """KL to fp32 against bytes, for codecs used both ways."""
    pyplot = get_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in result["rows"]:
        if row["direction"] != "both" or row["kl"] <= 0:
            continue
        is_default = row["codec"] == "default"
        axes.scatter(row["bytes_per_token"], row["kl"], color="tab:red" if is_default else "0.4")
        axes.annotate(
            f"{row['codec']} ({row['top1_agreement']:.1%})",
            (row["bytes_per_token"], row["kl"]),
            xytext=(5, 4),
            textcoords="offset points",
        )
    axes.set_yscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("bytes per decoded token, both ways, with headers")
    axes.set_ylabel("KL(fp32 || codec), nats per token")
    axes.set_title("Payload codecs; in brackets the share of tokens with the same first choice")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def check_plotting(file: Path | None) -> None:
    """Raise ConfigError if ``file`` is wanted and cannot be drawn: before the work."""
    if file is None:
        return
    get_pyplot()
    if file.suffix.lower() != ".png":
        raise ConfigError(f"--plot {file}: pictures are PNG files; choose a name that ends in .png")


def get_pyplot() -> Any:
    """Matplotlib for pictures in files; ConfigError if it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib; install it with: pip install 'privatelora[bench]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
