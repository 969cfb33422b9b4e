"""``privatelora chat`` over two processes: with piped input, and in a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import MAIN, SERVE, Commands, Process
from tests.e2e.terminal import Terminal

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
EDITING_ENDS = "\x1b[?2004l"
"""Pasted text is marked no more: what follows is the answer."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    directory = tmp_path_factory.mktemp("chat")
    options = {"max_position_embeddings": 4096}
    made, _ = tiny_deployment("llama", directory, model_options=options, rank_up=8, rank_down=8)
    return made


@pytest.fixture(scope="module")
def address(deployment: Deployment) -> Iterator[str]:
    with Process(SERVE, deployment.cloud_yaml()) as cloud:
        yield cloud.read_ready()


def test_commands_from_a_pipe(
    deployment: Deployment, address: str, commands: Commands, tmp_path: Path
) -> None:
    config = deployment.edge_yaml(address, sampling={"max_tokens": 8, "ignore_eos": True})
    file = tmp_path / "talk.json"
    lines = (
        *("How many\\", "apples?", "/model base", "/retry", f"/save {file}", "/nonsense"),
        *("/set max_tokens 2", "And?", "/undo", "/status", f"/save {file}", "/quit", "not read"),
    )
    found = commands.run(MAIN, "chat", config, stdin="".join(f"{line}\n" for line in lines))
    assert found.code == 0, found.err
    first, again, error, shorter = found.err.splitlines()
    assert first.startswith("[8 tokens · first after")
    assert again.startswith("[8 tokens")
    assert error.startswith("error: there is no command '/nonsense'")
    assert shorter.startswith("[2 tokens")
    question, answer = json.loads(file.read_text(encoding="utf-8"))
    assert question == {"role": "user", "content": "How many\napples?"}
    with_adapter, _, without = found.out.partition("\nbase answers from now on\n")
    assert without.startswith(answer["content"] + "\n")
    assert answer["content"] != with_adapter
    for shown in (f"2 messages written to {file}", "forgotten: And?", f" {address}\n"):
        assert shown in found.out
    assert "sent ExchangeReply" in found.out


def test_typing_stopping_and_switching_in_a_terminal(
    deployment: Deployment, address: str, tmp_path: Path
) -> None:
    endless = {"max_tokens": 4000, "ignore_eos": True}
    config = deployment.edge_yaml(address, "terminal.yaml", max_positions=4096, sampling=endless)
    environment = {"XDG_STATE_HOME": str(tmp_path)}
    with Terminal(MAIN, "chat", config, environment=environment) as terminal:
        terminal.read_until("adapter>")
        terminal.press(f"How many apples?{ENTER}")
        terminal.read_until(EDITING_ENDS)
        terminal.read_more(50)
        terminal.press(CTRL_C)
        terminal.read_until("[stopped]")
        terminal.read_until("adapter>")
        terminal.press(f"/model base{ENTER}")
        terminal.read_until("base answers from now on")
        terminal.read_until("base>")
        terminal.press(f"/retry{ENTER}")
        terminal.read_until(EDITING_ENDS)
        terminal.read_more(50)
        terminal.press(CTRL_C)
        terminal.read_until("[stopped]")
        terminal.read_until("base>")
        terminal.press(f"not said{CTRL_C}")
        terminal.read_until(EDITING_ENDS)
        terminal.read_until("base>")
        terminal.press(f"/set max_tokens 3{ENTER}")
        terminal.read_until("max_tokens: 3")
        terminal.read_until("base>")
        terminal.press(f"/retry{ENTER}")
        terminal.read_until("[3 tokens")
        terminal.read_until("base>")
        terminal.press(CTRL_D)
        assert terminal.wait() == 0
    history = (tmp_path / "privatelora" / "history").read_text()
    assert "+How many apples?\n" in history
    assert "not said" not in history
