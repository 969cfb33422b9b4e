"""``privatelora-train``: from private data to an adapter."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from privatelora.cli._app import LogFormat, print_fields, print_json, run, set_up_logging
from privatelora.errors import ConfigError

if TYPE_CHECKING:
    from privatelora.training.config import TrainConfig
    from privatelora.training.run import Outcome, Progress

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLES = """Examples:

privatelora-train configs/train-facts.yaml

privatelora-train configs/train-facts.yaml --resume

privatelora-train configs/train-facts.yaml --score http://127.0.0.1:18231/v1
"""


@app.command(epilog=EXAMPLES)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; see configs/train-*.yaml.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in its out folder.")
    ] = False,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Train nothing: ask the adapter that is served there the held-out questions.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens.")] = False,
) -> None:
    """Train an adapter on private data, and measure what it learnt and what it forgot.

    Ctrl-C ends it after the step under way, with a checkpoint to go on from.
    """
    set_up_logging(verbose, LogFormat.TEXT)
    from privatelora.training.config import read_train_config

    settings = read_train_config(config)
    if score is not None:
        _print_scores(_score(settings, score), as_json)
        return
    _quieten()
    from privatelora.training.run import run_training

    with _show_progress() as progress:
        outcome = run_training(settings, resume=resume, progress=progress)
    if as_json:
        print_json({**outcome.results, "written": {k: str(v) for k, v in outcome.written.items()}})
    else:
        _print_outcome(config, settings, outcome)


def _score(settings: TrainConfig, url: str) -> dict[str, Any]:
    """Accuracy on every held-out set, as served."""
    from privatelora.training.data.sources import read_sources
    from privatelora.training.served import score_served

    if not settings.data.evaluate:
        raise ConfigError("data.evaluate names no held-out questions to ask")
    scores = {}
    with _show_progress() as progress:
        for name, sources in settings.data.evaluate.items():
            score = score_served(
                url,
                read_sources(sources),
                settings=settings.data,
                max_new_tokens=settings.data.max_answer_tokens,
                progress=partial(progress, name),
            )
            scores[name] = score.details()
    return scores


def _print_scores(scores: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(scores)
    else:
        print_fields({f"{name}, right": _share(score) for name, score in scores.items()})


def _quieten() -> None:
    """No bars of other programs for what takes a second."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _print_outcome(file: Path, settings: TrainConfig, outcome: Outcome) -> None:
    console = Console()
    table = Table("", "before", "after", box=None, pad_edge=False)
    before, after = outcome.results["before"], outcome.results["after"]
    for name in after:
        if name != "retention":
            table.add_row(f"{name}, right", _share(before[name]), _share(after[name]))
    if "retention" in after:
        kept = after["retention"]
        table.add_row("general text, as the base model", "100 %", f"{kept['agreement']:.1%}")
        table.add_row("general text, KL to it in nats", "0", f"{kept['kl']:.3g}")
    if after:
        console.print(table)
    if outcome.results["stopped_early"]:
        command = f"privatelora-train {shlex.quote(str(file))} --resume"
        print(f"\nstopped after step {outcome.results['steps']}; to go on: {command}")
    print()
    for what, path in outcome.written.items():
        print(f"{what.ljust(9)} {path}")
    if settings.mode == "central" and "adapter" in outcome.written:
        print(f"\nServe it: {_partition_command(settings, outcome)}")


def _partition_command(settings: TrainConfig, outcome: Outcome) -> str:
    method = settings.method
    words = ["privatelora", "partition", str(settings.model), str(settings.out / "shards")]
    words += ["--plan", str(outcome.written["plan"])]
    basis = outcome.written.get("basis", getattr(method, "basis", "svd"))
    words += ["--basis", str(basis)]
    if basis == "random":
        words += ["--seed", str(getattr(method, "seed", 0))]
    return shlex.join(words)


def _share(score: dict[str, Any]) -> str:
    low, high = score["ci_low"], score["ci_high"]
    return f"{score['accuracy']:.1%} ({low:.1%}-{high:.1%}, n={score['num']})"


@contextlib.contextmanager
def _show_progress() -> Iterator[Progress]:
    """Give a callback that draws a bar for each thing that takes a while, on stderr."""
    console = Console(stderr=True)
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int) -> None:
            name = what.partition(",")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(what)
            bars.update(
                tasks[name], description=what, completed=done, total=total, visible=done < total
            )

        yield advance


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
