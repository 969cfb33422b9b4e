"""The command that computes instead of measuring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from privatelora.benchmarks.options import DeviceOption, JsonOption, PlotOption, finish, working
from privatelora.cli._app import check_writable
from privatelora.errors import ConfigError

if TYPE_CHECKING:
    from privatelora.benchmarks.predict_choose import Every
    from privatelora.benchmarks.predict_hardware import Hardware
    from privatelora.benchmarks.predict_shapes import ModelShape
    from privatelora.runtime.codecs import Codecs

HERE = "here"
DEFAULT_LINKS = ("0ms,60/100mbps", "20ms,60/100mbps", "80ms,60/100mbps")

ComputerOption = Annotated[
    str | None,
    typer.Option(
        help="here (measured with the model), a100-80g, h100-80g or iphone-13-pro-max. Default: "
        "here for a checkpoint, else a100-80g and iphone-13-pro-max.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to a program."""
    app.command(epilog=PREDICT_EXAMPLE)(predict)


PREDICT_EXAMPLE = (
    "Example: privatelora-bench predict --json paper.json --plot paper.png\n\n"
    "privatelora-bench predict --model 7b --every 1,8,all --link 20ms,60/100mbps --sessions 1,32"
)


def predict(
    model: Annotated[
        str | None,
        typer.Option(
            help="7b, 13b, 30b, or a model: directory, GGUF file, hub id or pypi:NAME. Default: "
            "the paper's table.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[str, typer.Option(help="Layers per exchange point, or all.")] = "1,8,16,all",
    link: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RTT[,UP/DOWN]",
            help="Such as 20ms,60/100mbps; may be repeated. Default: "
            + ", then ".join(DEFAULT_LINKS)
            + ".",
            show_default=False,
        ),
    ] = None,
    codecs: Annotated[
        str, typer.Option(help="For everything: names such as fp16,int8; or default.")
    ] = "default",
    sessions: Annotated[str, typer.Option(help="Numbers of sessions on the cloud.")] = "1",
    rank_up: Annotated[
        int | None, typer.Option(min=1, help="Default: 128, or what the model has room for.")
    ] = None,
    rank_down: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 256,
    context: Annotated[int, typer.Option(min=0, help="Positions in a session's cache.")] = 0,
    cloud: ComputerOption = None,
    edge: ComputerOption = None,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Compute tokens/s for any model, arrangement, codec and network.

    Without a model: the paper's table of speeds from its own inputs, and what becomes of it with a
    round trip time. docs/PREDICTION.md has the formulas.
    """
    from privatelora.benchmarks.predict_hardware import parse_link
    from privatelora.benchmarks.show import check_plotting

    check_writable(json_file)
    check_plotting(plot_file)
    check_writable(plot_file)
    if model is None:
        _paper(json_file, plot_file)
        return
    from privatelora.benchmarks.predict import predict as compute
    from privatelora.benchmarks.predict_choose import arrangements, label
    from privatelora.benchmarks.predict_show import (
        predictions_plot,
        predictions_table,
        scenario_curves,
    )
    from privatelora.benchmarks.predict_terms import Scenario

    everys = [parse_every(text) for text in every.split(",")]
    links = [parse_link(text) for text in link or DEFAULT_LINKS]
    chosen = {name.strip(): codecs_named(name.strip()) for name in codecs.split(",")}
    counts = [_count(text.strip()) for text in sessions.split(",")]
    shape, at_cloud, at_edge, facts = computers(model, cloud, edge, device)
    plans = arrangements(lambda number: shape.plan(number, rank_up, rank_down), everys)
    rows: list[dict[str, Any]] = []
    scenarios = []
    for plan in plans:
        for name, of_kinds in chosen.items():
            for place in links:
                for count in counts:
                    scenario = Scenario(
                        shape,
                        plan,
                        of_kinds,
                        place,
                        at_cloud,
                        at_edge,
                        sessions=count,
                        context=context,
                        prompt_tokens=prompt_tokens,
                    )
                    row = {"arrangement": label(plan), "codec": name, "sessions": count}
                    row |= {"link": place.as_json(), "link_text": str(place)}
                    rows.append(row | compute(scenario).as_json())
            scenarios.append((f"{label(plan)}, {name}", scenario))
    result = {
        "benchmark": "predict",
        "model": shape.name,
        "cloud": at_cloud.as_json(),
        "edge": at_edge.as_json(),
        **facts,
        "rows": rows,
    }
    finish(result, predictions_table(result), json_file)
    if plot_file is not None:
        predictions_plot(scenario_curves(scenarios), links[0], plot_file)


def _paper(json_file: Path | None, plot_file: Path | None) -> None:
    from privatelora.benchmarks.predict_paper import PAPER_LINK, paper_table
    from privatelora.benchmarks.predict_show import (
        paper_curves,
        paper_table_view,
        predictions_plot,
    )

    result = paper_table()
    finish(result, paper_table_view(result), json_file)
    console = Console(width=max(120, Console().width))
    for number, assumption in enumerate(result["assumptions"], start=1):
        console.print(f"{number}. {assumption}", highlight=False)
    if plot_file is not None:
        predictions_plot(paper_curves(), PAPER_LINK, plot_file)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--sessions {text!r}: give numbers from 1, such as 1,32")
    return int(text)


def parse_every(text: str) -> Every:
    """A number of layers from 1, or all. Raises ConfigError."""
    text = text.strip()
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--every {text!r}: give numbers from 1, or all, such as 1,8,all")
    return int(text)


def codecs_named(name: str) -> Codecs:
    """A codec for everything, or what edges ask for by default. Raises ConfigError."""
    from privatelora.benchmarks.predict_timing import default_codecs
    from privatelora.runtime.codecs import Codecs
    from privatelora.runtime.payload.names import CODEC_NAMES

    if name == "default":
        return default_codecs()
    if name not in CODEC_NAMES:
        raise ConfigError(f"--codecs {name!r}: choose from default, {', '.join(CODEC_NAMES)}")
    return Codecs(name, name, name, name)


def computers(
    model: str, cloud: str | None, edge: str | None, device: str = "cpu"
) -> tuple[ModelShape, Hardware, Hardware, dict[str, Any]]:
    """The model's shape and both ends, measured here where that was asked for; and how.

    ``device``: of a cloud that is measured.

    Raises ConfigError or PartitionError.
    """
    from privatelora.benchmarks.predict_hardware import A100_80G, IPHONE_13_PRO_MAX, preset
    from privatelora.benchmarks.predict_shapes import ModelShape, named_shape

    shape = named_shape(model)
    chosen_cloud = None if cloud in (None, HERE) else preset("--cloud", cloud)
    if device != "cpu" and (shape is not None or chosen_cloud is not None):
        raise ConfigError(
            f"--device {device} is of a cloud that is measured here, and this one is not; leave it "
            "out"
        )
    if shape is not None:
        if HERE in (cloud, edge):
            raise ConfigError(
                f"{shape.name} is a shape without weights, with which nothing can be measured "
                "here; name a checkpoint, or other computers"
            )
        at_cloud = chosen_cloud or A100_80G
        return shape, at_cloud, preset("--edge", edge or IPHONE_13_PRO_MAX.name), {}
    chosen_edge = None if edge in (None, HERE) else preset("--edge", edge)
    if chosen_cloud is not None and chosen_edge is not None:
        from privatelora.partition.checkpoint import open_checkpoint

        with open_checkpoint(model) as checkpoint:
            return ModelShape(model, checkpoint.config), chosen_cloud, chosen_edge, {}
    from privatelora.benchmarks.measure import machine_facts
    from privatelora.benchmarks.predict_calibrate import CalibrateSettings, calibrate

    with working() as (directory, report):
        here = calibrate(CalibrateSettings(model, directory, device=device), report)
    facts = {"machine": machine_facts(), "calibration": here.as_json()}
    return here.shape, chosen_cloud or here.cloud, chosen_edge or here.edge, facts
