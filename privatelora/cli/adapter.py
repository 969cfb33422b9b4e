"""``privatelora adapter``: make, look at, and import the private matrices M."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from privatelora.cli import _from_peft
from privatelora.cli._app import print_fields, print_json
from privatelora.errors import PartitionError

INIT_EXAMPLE = "Example: privatelora adapter init shards/edge adapter.safetensors"
INSPECT_EXAMPLE = "Example: privatelora adapter inspect adapter.safetensors --json"
IMPORT_EXAMPLE = "Example: privatelora adapter import gsm8k.bin imported --num-layers 32"

app = typer.Typer(no_args_is_help=True, help="Make, look at, and import adapters.")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(main: typer.Typer) -> None:
    """Add the commands to a program, as ``adapter``."""
    app.command("from-peft", epilog=_from_peft.EXAMPLES)(_from_peft.from_peft)
    main.add_typer(app, name="adapter")


@app.command("init", epilog=INIT_EXAMPLE)
def init(
    edge_shard: Annotated[Path, typer.Argument(help="Edge shard the adapter is for.")],
    out: Annotated[Path, typer.Argument(help="File to write, readable by you alone.")],
    std: Annotated[
        float, typer.Option(min=0.0, help="Deviation of M; 0 is exactly the base model.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed, if --std is not 0.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a fresh adapter for an edge shard."""
    from privatelora.partition.adapter import init_adapter, save_adapter
    from privatelora.partition.shard import open_shard

    if out.exists():
        raise PartitionError(f"{out} exists; choose another name, or move it away first")
    manifest = open_shard(edge_shard, "edge").manifest
    plan = manifest.plan
    adapter = init_adapter(
        plan, manifest.basis_fingerprint, manifest.model_fingerprint, std=std, seed=seed
    )
    save_adapter(out, adapter)
    if as_json:
        print_json({"adapter": str(out), "parameters": plan.num_parameters})
    else:
        print_fields({"adapter": str(out), "parameters": f"{plan.num_parameters:,}"})


@app.command("inspect", epilog=INSPECT_EXAMPLE)
def inspect(
    file: Annotated[Path, typer.Argument(help="Adapter file.")],
    as_json: AsJson = False,
) -> None:
    """Show what an adapter was made for, and how large its matrices are."""
    from privatelora.partition.adapter import read_adapter

    adapter = read_adapter(file)
    plan = adapter.plan
    norms = {
        layer: {target: float(adapter.weights[layer, target].norm()) for target in plan.targets}
        for layer in plan.layers
    }
    if as_json:
        print_json(
            {
                "arrangement": plan.arrangement(),
                "basis_fingerprint": adapter.basis_fingerprint,
                "model_fingerprint": adapter.model_fingerprint,
                "parameters": plan.num_parameters,
                "norms": norms,
            }
        )
        return
    print_fields(
        {
            "adapted": f"{', '.join(plan.targets)} of {len(plan.layers)} layers "
            f"(model of {plan.num_layers})",
            "every": str(plan.every),
            "rank up, down": f"{plan.rank_up}, {plan.rank_down}",
            "scaling": str(plan.scaling),
            "basis": adapter.basis_fingerprint,
            "model": adapter.model_fingerprint or "any with this basis",
            "parameters": f"{plan.num_parameters:,}",
        }
    )
    print("\nnorm of M")
    print("layer" + "".join(f"{target:>12}" for target in plan.targets))
    for layer, by_target in norms.items():
        print(f"{layer:>5}" + "".join(f"{norm:>12.4g}" for norm in by_target.values()))


@app.command("import", epilog=IMPORT_EXAMPLE)
def import_published(
    published_file: Annotated[
        Path, typer.Argument(help="Torch state dict of the published PrivateLoRA system.")
    ],
    out_dir: Annotated[Path, typer.Argument(help="Directory for basis, plan and adapter.")],
    scaling: Annotated[float, typer.Option(help="Factor the adapter was trained with.")] = 1.0,
    num_layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Layers of the model.", show_default="up to the highest adapted one"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a published adapter into a basis, a plan and an adapter of this project."""
    from privatelora.partition.published import (
        ADAPTER_NAME,
        BASIS_NAME,
        PLAN_NAME,
        read_published,
        write_published,
    )

    published = read_published(published_file, num_layers=num_layers, scaling=scaling)
    write_published(out_dir, published)
    command = (
        f"privatelora partition MODEL SHARDS --plan {shlex.quote(str(out_dir / PLAN_NAME))} "
        f"--basis {shlex.quote(str(out_dir / BASIS_NAME))}"
    )
    plan = published.plan
    if as_json:
        print_json(
            {
                "basis": str(out_dir / BASIS_NAME),
                "plan": str(out_dir / PLAN_NAME),
                "adapter": str(out_dir / ADAPTER_NAME),
                "arrangement": plan.arrangement(),
                "parameters": plan.num_parameters,
                "next_command": command,
            }
        )
        return
    print_fields(
        {
            "basis": str(out_dir / BASIS_NAME),
            "plan": str(out_dir / PLAN_NAME),
            "adapter": str(out_dir / ADAPTER_NAME),
            "adapted": f"{', '.join(plan.targets)} of {len(plan.layers)} layers "
            f"(model of {plan.num_layers})",
            "rank up, down": f"{plan.rank_up}, {plan.rank_down}",
            "parameters": f"{plan.num_parameters:,}",
        }
    )
    print(f"\nSplit the model with it: {command}")
