"""``privatelora generate`` and what every command offers, each run in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from privatelora import __version__
from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import BENCH, EDGE, MAIN, SERVE, TRAIN, Commands
from tests.partition.tiny import tiny_model, tiny_tokenizer

QUESTION = "How many letters are there?"
NUM_TOKENS = 40


class Tiny(NamedTuple):
    """A tiny model, its shards and adapter, and transformers with and without the adapter."""

    model: Path
    deployment: Deployment
    base: Any
    adapted: Any


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    directory = tmp_path_factory.mktemp("generate")
    deployment, adapted = tiny_deployment("qwen2", directory, every=2, rank_up=8, rank_down=6)
    return Tiny(directory / "model", deployment, tiny_model("qwen2"), adapted)


def prompt_ids(*, chat: bool) -> list[int]:
    tokenizer = tiny_tokenizer()
    if not chat:
        return list(tokenizer.encode(QUESTION))
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)


def transformers_says(model: Any, ids: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    given = torch.tensor([ids])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    return list(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("split", [False, True], ids=["checkpoint", "shards"])
def test_greedy_tokens_are_those_of_transformers(
    tiny: Tiny, commands: Commands, split: bool, adapted: bool, chat: bool
) -> None:
    arguments: list[object] = [tiny.deployment.directory if split else tiny.model, QUESTION]
    if adapted:
        arguments += ["--adapter", tiny.deployment.adapter_file]
        arguments += [] if split else ["--basis", "random"]
    if not chat:
        arguments.append("--plain")
    result = commands.run(MAIN, "generate", *arguments, "--max-tokens", NUM_TOKENS, "--json")
    assert (result.code, result.err) == (0, "")
    ids = prompt_ids(chat=chat)
    expected = transformers_says(tiny.adapted if adapted else tiny.base, ids)
    assert result.json["token_ids"] == expected
    ended = expected[-1] == 2
    assert result.json["finish_reason"] == ("stop" if ended else "length")
    assert result.json["figures"]["prompt_tokens"] == len(ids)
    assert result.json["figures"]["completion_tokens"] == len(expected)
    assert result.json["figures"]["round_trips_per_token"] == 0
    if chat and split:
        assert expected != transformers_says(tiny.base if adapted else tiny.adapted, ids)


def test_text_goes_to_stdout_and_figures_to_stderr(tiny: Tiny, commands: Commands) -> None:
    arguments = ("generate", tiny.model, "-", "--max-tokens", 12)
    shown = commands.run(MAIN, *arguments, stdin=QUESTION)
    assert shown.code == 0, shown.err
    documented = commands.run(MAIN, *arguments, "--json", stdin=QUESTION)
    assert shown.out.rstrip("\n") == documented.json["text"].rstrip("\n")
    assert "12 tokens · first after" in shown.err
    assert "Traceback" not in shown.err


def test_a_seed_repeats_an_answer(tiny: Tiny, commands: Commands) -> None:
    def tokens(seed: int) -> list[int]:
        arguments = (tiny.model, QUESTION, "--temperature", 2, "--top-p", 0.9, "--seed", seed)
        result = commands.run(MAIN, "generate", *arguments, "--max-tokens", 16, "--json")
        assert result.code == 0, result.err
        return list(result.json["token_ids"])

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tiny: Tiny, commands: Commands, dtype: str) -> None:
    """The first token is that of transformers in the same precision."""
    arguments = (tiny.model, QUESTION, "--dtype", dtype, "--max-tokens", 4, "--json")
    result = commands.run(MAIN, "generate", *arguments)
    assert result.code == 0, result.err
    model = tiny_model("qwen2").to(getattr(torch, dtype))
    expected = transformers_says(model, prompt_ids(chat=True), 1)
    assert result.json["token_ids"][0] == expected[0]


def test_version(commands: Commands) -> None:
    result = commands.run(MAIN, "--version")
    assert (result.code, result.out, result.err) == (0, f"privatelora {__version__}\n", "")


COMMANDS: dict[str, tuple[str, ...]] = {
    "serve": (SERVE,),
    "edge": (EDGE,),
    "partition": (MAIN, "partition"),
    "adapter init": (MAIN, "adapter", "init"),
    "adapter inspect": (MAIN, "adapter", "inspect"),
    "adapter import": (MAIN, "adapter", "import"),
    "adapter from-peft": (MAIN, "adapter", "from-peft"),
    "chat": (MAIN, "chat"),
    "generate": (MAIN, "generate"),
    "demo": (MAIN, "demo"),
    "keys new": (MAIN, "keys", "new"),
    "keys token": (MAIN, "keys", "token"),
    "config check": (MAIN, "config", "check"),
    "config schema": (MAIN, "config", "schema"),
    "plan": (MAIN, "plan"),
    "status": (MAIN, "status"),
    "bench overhead": (BENCH, "overhead"),
    "bench scheduling": (BENCH, "scheduling"),
    "bench transport": (BENCH, "transport"),
    "bench serve": (BENCH, "serve"),
    "bench situations": (BENCH, "situations"),
    "bench load": (BENCH, "load"),
    "bench quality": (BENCH, "quality"),
    "bench turns": (BENCH, "turns"),
    "bench http": (BENCH, "http"),
    "bench emulator": (BENCH, "emulator"),
    "bench arrangements": (BENCH, "arrangements"),
    "bench training": (BENCH, "training"),
    "bench predict": (BENCH, "predict"),
    "bench sweep": (BENCH, "sweep"),
    "bench profile": (BENCH, "profile"),
    "bench compare": (BENCH, "compare"),
    "bench schema": (BENCH, "schema"),
    "bench random-model": (BENCH, "random-model"),
    "train": (TRAIN,),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(commands: Commands, name: str) -> None:
    result = commands.run(*COMMANDS[name], "--help")
    assert (result.code, result.err) == (0, "")
    assert "Usage: " in result.out
    assert "Example" in result.out


@pytest.mark.parametrize(
    "group", [(MAIN,), (MAIN, "adapter"), (MAIN, "keys"), (MAIN, "config"), (BENCH,)], ids=" ".join
)
def test_help_of_a_group_names_its_commands(commands: Commands, group: tuple[str, ...]) -> None:
    result = commands.run(*group, "--help")
    assert result.code == 0, result.err
    inside = [names[len(group)] for names in COMMANDS.values() if names[: len(group)] == group]
    listed = [line.split() for line in result.out.splitlines()]
    for name in inside:
        assert any(name in words[:3] for words in listed), result.out


def test_every_command_is_in_the_table_above(commands: Commands) -> None:
    """A new command shows up in the help of its group, and has to come here too."""
    from typer.main import get_command

    from privatelora.benchmarks.cli import app as bench
    from privatelora.cli.main import app as main

    def leaves(command: Any, *path: str) -> set[tuple[str, ...]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return {path}
        return {leaf for name, sub in inner.items() for leaf in leaves(sub, *path, name)}

    found = leaves(get_command(main), MAIN) | leaves(get_command(bench), BENCH)
    assert found | {(SERVE,), (EDGE,), (TRAIN,)} == set(COMMANDS.values())


def test_a_usage_error_is_status_2(commands: Commands) -> None:
    result = commands.run(MAIN, "partition")
    assert result.code == 2
    assert "Missing argument" in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
