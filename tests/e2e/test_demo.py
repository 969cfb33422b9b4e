"""The demo, kept running: a chat page and an API, until it is asked to end."""

from __future__ import annotations

import json
import signal
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.e2e.processes import MAIN, Process
from tests.partition.tiny import save_tiny


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
