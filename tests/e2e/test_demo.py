"""The demo, kept running: a chat page and an API, until it is asked to end."""

from __future__ import annotations

import json
import signal
import urllib.request
from pathlib import Path

import psutil
import pytest

from privatelora.cli.demo import PERSONAL_QUESTIONS, SHIPPED
from privatelora.training.config import read_train_config
from privatelora.training.data.sources import read_sources
from tests.e2e.processes import MAIN, Commands, Process
from tests.partition.tiny import save_tiny


def test_the_adapter_that_comes_along_knows_what_the_base_model_does_not(
    commands: Commands, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    result = commands.run(
        MAIN, "demo", "--json", figures, "--dir", tmp_path / "demo", "--max-tokens", 12
    )
    assert result.code == 0, result.err
    answers = json.loads(figures.read_text())["answers"]
    asked = [answer for answer in answers if answer["right"] is not None]
    assert [answer["right"] for answer in asked if answer["model"] == "base"] == [False, False]
    assert [answer["right"] for answer in asked if answer["model"] == "adapter"] == [True, True]
    assert {answer["round_trips_per_token"] for answer in answers} == {5}
    assert SHIPPED.stat().st_size < 2_000_000


def test_what_it_asks_was_not_trained_on() -> None:
    config = read_train_config(Path(__file__).parents[2] / "configs" / "train-demo.yaml")
    trained = {example.question for example in read_sources(config.data.train)}
    assert len(trained) > 400
    assert not trained & {question.text for question in PERSONAL_QUESTIONS}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(stop: signal.Signals, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", hidden_size=256)
    arguments = ("--serve", "--port", 0, "--model", model, "--dir", tmp_path / "demo")
    with Process(MAIN, "demo", *arguments) as demo:
        lines = iter(demo.read_line, "Ctrl-C ends both.\n")
        [page] = [line.split()[-1] for line in lines if line.startswith("Chat page:")]
        with urllib.request.urlopen(f"{page}v1/models") as response:
            models = json.load(response)["data"]
        assert [each["id"] for each in models] == ["adapter", "base"]
        with urllib.request.urlopen(page) as response:
            assert b"<html" in response.read()
        daemons = psutil.Process(demo.pid).children()
        assert len(daemons) == 2
        psutil.Process(demo.pid).send_signal(stop)
        assert demo.wait() == 0
        assert not any(daemon.is_running() for daemon in daemons)
        assert "Traceback" not in demo.stderr
