"""The command that makes a model to measure with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privatelora.benchmarks.options import FloatDtype
from privatelora.cli.partition import show_progress


def register(app: typer.Typer) -> None:
    """Add the command to a program."""
    app.command(epilog=EXAMPLE)(random_model)


EXAMPLE = "Example: privatelora-bench random-model 7b out/random-7b"


def random_model(
    shape: Annotated[str, typer.Argument(help="7b, 13b, 30b, a config.json or its folder.")],
    directory: Annotated[Path, typer.Argument(help="Where the model goes.")],
    dtype: Annotated[FloatDtype, typer.Option(help="Of its weights.")] = FloatDtype.BFLOAT16,
    seed: Annotated[int, typer.Option(help="The same one gives the same weights.")] = 0,
) -> None:
    """Write a model with random weights, to measure with one that is not at hand.

    A Hugging Face directory with a tokenizer of bytes. It says nothing sensible, as fast as a
    model of its shape that does.
    """
    import torch

    from privatelora.benchmarks.random_model import model_fields, write_random_model

    fields = model_fields(shape)
    with show_progress() as progress:
        num_weights = write_random_model(
            fields, directory, getattr(torch, dtype.value), seed, progress
        )
    print(f"{directory}: {num_weights / 1e9:.3g} billion random weights in {dtype.value}")
