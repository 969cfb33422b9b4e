"""A short chaos run over every transport. ``python -m tests.chaos`` is the long one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.__main__ import main
from tests.chaos.campaign import NAMES

SEED = 3
NUM_FAULTS = 4


def test_every_answer_is_that_of_undisturbed_daemons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "chaos.json"
    arguments = ["--seed", SEED, "--minutes", 0, "--faults", NUM_FAULTS, "--at-once", 4]
    status = main([*map(str, arguments), "--json", str(figures)])
    assert status == 0, capsys.readouterr().out
    outcomes = json.loads(figures.read_text())
    assert [outcome["transport"] for outcome in outcomes] == list(NAMES)
    faults: Counter[str] = Counter()
    for outcome in outcomes:
        assert outcome["equal"] == outcome["finished"] >= 6
        assert sum(outcome["faults"].values()) >= NUM_FAULTS
        faults.update(outcome["faults"])
    assert {"kill cloud", "kill edge", "restart cloud", "drop", "corrupt", "half-open"} <= {*faults}
