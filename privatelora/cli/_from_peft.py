"""``privatelora adapter from-peft``: a LoRA becomes an adapter, and what is lost is reported."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from privatelora.cli._app import print_fields, print_json
from privatelora.errors import ConfigError, PartitionError

if TYPE_CHECKING:
    from privatelora.cli._from_peft_run import Projected, Request

EXAMPLES = """Examples:

privatelora adapter from-peft my-lora out --model ./SmolLM2-135M-Instruct --every 6

privatelora adapter from-peft my-lora out --shards shards --calibration notes.txt --json
"""
PLAN_NAME = "plan.yaml"
ADAPTER_NAME = "adapter.safetensors"


def from_peft(
    peft_dir: Annotated[Path, typer.Argument(help="Folder that PEFT's save_pretrained wrote.")],
    out_dir: Annotated[Path, typer.Argument(help="Directory for plan and adapter.")],
    model: Annotated[
        str | None,
        typer.Option(help="The LoRA's model: directory, .gguf file, pypi:NAME, or hub id."),
    ] = None,
    shards: Annotated[
        Path | None,
        typer.Option(help="Instead of --model: its shards, with their plan and basis."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="YAML file with any of these options; those given here override it."),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(metavar="G|all", help="Adapted layers per exchange point.", show_default="1"),
    ] = None,
    rank_up: Annotated[
        int | None, typer.Option(help="Numbers per token towards the edge.", show_default="128")
    ] = None,
    rank_down: Annotated[
        int | None, typer.Option(help="Numbers per token and projection back.", show_default="128")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to adapt, such as 0-5,8.", show_default="the LoRA's"),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Projections to adapt.", show_default="the LoRA's")
    ] = None,
    basis: Annotated[
        str | None,
        typer.Option(metavar="svd|random|FILE", help="How A and B are made.", show_default="svd"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of a random basis.", show_default="0")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|none",
            help="Text like what the LoRA is used on; none: fit the weights alone.",
            show_default="general text",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Project a PEFT LoRA onto a basis, and report what is lost.

    The model runs in float32: on text, to fit M to what the LoRA changes there, and on text kept
    back, to compare what is predicted.
    """
    # Imported here so that --help does not wait for torch.
    from privatelora.cli._from_peft_run import Request, run
    from privatelora.cli.partition import parse_every
    from privatelora.partition.adapter import save_adapter
    from privatelora.partition.files import os_errors
    from privatelora.partition.plan_file import write_plan_file

    options = {
        "every": None if every is None else parse_every(every),
        "rank_up": rank_up,
        "rank_down": rank_down,
        "layers": layers,
        "targets": targets,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if (model is None) == (shards is None):
        raise ConfigError("give either --model or --shards")
    if shards is not None and (given or plan or basis is not None or seed is not None):
        raise ConfigError("--shards have a plan and a basis of their own; leave out what sets them")
    if seed is not None and basis != "random":
        raise ConfigError("--seed belongs to --basis random; leave it out, or add that")
    request = Request(
        peft_dir, model, shards, plan, given, basis or "svd", seed or 0, calibration, device
    )
    for name in (PLAN_NAME, ADAPTER_NAME):
        if (out_dir / name).exists():
            raise PartitionError(f"{out_dir / name} exists; choose another directory")
    with Console(stderr=True).status("reading the model") as status:
        projected = run(request, status.update)
    with os_errors(f"write {out_dir}"):
        out_dir.mkdir(parents=True, exist_ok=True)
    write_plan_file(out_dir / PLAN_NAME, projected.adapter.plan)
    save_adapter(out_dir / ADAPTER_NAME, projected.adapter)
    command = _next_command(request, out_dir)
    if as_json:
        print_json(_report(projected, out_dir, command))
    else:
        _print(projected, out_dir, command)


def _next_command(request: Request, out_dir: Path) -> str:
    """What to do with the adapter: split the model for it, or try it with the shards."""
    if request.shards is not None:
        given = [str(request.shards), "Hello", "--adapter", str(out_dir / ADAPTER_NAME)]
        return shlex.join(["privatelora", "generate", *given])
    words = ["privatelora", "partition", str(request.model), "SHARDS"]
    words += ["--plan", str(out_dir / PLAN_NAME), "--basis", request.basis]
    words += ["--seed", str(request.seed)] if request.basis == "random" else []
    return shlex.join(words)


def _report(projected: Projected, out_dir: Path, command: str) -> dict[str, object]:
    plan = projected.adapter.plan
    outputs = projected.outputs
    return {
        "plan": str(out_dir / PLAN_NAME),
        "adapter": str(out_dir / ADAPTER_NAME),
        "arrangement": plan.arrangement(),
        "parameters": plan.num_parameters,
        "lora_base_model": projected.base_model,
        "calibration_tokens": projected.num_fitted,
        "held_out_tokens": projected.num_held_out,
        "layers": [asdict(lost) for lost in projected.lost],
        "left_out": [asdict(part) for part in projected.left_out],
        "outputs": None if outputs is None else asdict(outputs),
        "next_command": command,
    }


def _print(projected: Projected, out_dir: Path, command: str) -> None:
    plan = projected.adapter.plan
    print_fields(
        {
            "plan": str(out_dir / PLAN_NAME),
            "adapter": str(out_dir / ADAPTER_NAME),
            "adapted": f"{', '.join(plan.targets)} of {len(plan.layers)} layers, every "
            f"{plan.every}, rank {plan.rank_up} up, {plan.rank_down} down",
            "parameters": f"{plan.num_parameters:,}",
            "fitted to": f"{projected.num_fitted:,} tokens, judged on {projected.num_held_out:,}"
            if projected.num_fitted
            else "the weights alone",
        }
    )
    print("\nlost of what the LoRA changes (share of energy)")
    names = ["weights", *(["fitted", "held out"] if projected.num_fitted else [])]
    print("layer" + "".join(f"  {t} {name:<8}" for name in names for t in plan.targets))
    found = {(lost.layer, lost.target): lost for lost in projected.lost}
    for layer in plan.layers:
        row = [found.get((layer, target)) for target in plan.targets]
        values = [
            None if lost is None else getattr(lost, name.replace(" ", "_"))
            for name in names
            for lost in row
        ]
        print(f"{layer:>5}" + "".join(f"{'-' if v is None else f'{v:.4f}':>12}" for v in values))
    if projected.left_out:
        print("\nleft out, because no exchange reaches it (share of the LoRA's energy)")
        for part in projected.left_out:
            print(f"{part.share:>12.2%}  {part.part} ({part.num_parameters}x)")
    outputs = projected.outputs
    if outputs is not None:
        print(f"\npredictions against model and LoRA, {outputs.positions} positions held out")
        for name, found_there in (("this adapter", outputs.adapter), ("no adapter", outputs.base)):
            print(
                f"{name:>12}  KL {found_there.kl:.4f} nats, same top token "
                f"{found_there.top1_agreement:.1%}"
            )
    print(f"\nNext: {command}")
