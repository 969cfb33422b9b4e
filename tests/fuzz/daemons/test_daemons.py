"""Each daemon under a few inputs, and the fuzzer itself: what it finds, how it says so."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from tests.e2e.deployment import Deployment
from tests.e2e.processes import Process
from tests.fuzz.daemons import campaign
from tests.fuzz.daemons.__main__ import main
from tests.fuzz.daemons.campaign import Campaign, Report
from tests.fuzz.daemons.inputs import Input, Outcome, Target, Violation
from tests.fuzz.daemons.reports import as_text
from tests.fuzz.daemons.targets import TARGETS
from tests.fuzz.daemons.world import end, make_deployment

NUM_INPUTS = 80
NUM_WARM_UP = 40
GROUPS = (
    ("cloud-tcp", "cloud-tls", "cloud-zmq-curve", "cloud-shm"),
    ("edge-http", "edge-cloud", "metrics"),
)
"""Those of a group are fuzzed at the same time. The other ZeroMQ addresses have the same code."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return make_deployment(tmp_path_factory.mktemp("fuzz"))


async def run(target: Target, start: int, num_inputs: int, num_warm_up: int) -> Report:
    tried = Campaign(target, 1, num_warm_up)
    await tried.run(start, start + num_inputs, lambda report: None)
    return tried.report


@pytest.mark.parametrize("names", GROUPS, ids=["clouds", "edges"])
async def test_a_short_run(names: tuple[str, ...], deployment: Deployment) -> None:
    """No finding, and more than one way to end."""
    reports = await asyncio.gather(
        *(run(TARGETS[name](deployment), 0, NUM_INPUTS, NUM_WARM_UP) for name in names)
    )
    for report in reports:
        assert report.finding is None, str(report.finding)
        assert report.num_inputs == NUM_INPUTS
        assert {Outcome.ANSWERED, Outcome.REFUSED} <= {end for _, end in report.outcomes}


class Defective(Target):
    """Some program that lives until input 7 does ``harm`` to it."""

    name = "cloud-tcp"

    def __init__(self, harm: str) -> None:
        self._harm = harm

    async def start(self) -> None:
        self.watched = Process("http.server", 0, "--bind", "127.0.0.1")

    async def stop(self) -> None:
        end(self.watched)

    def make(self, rng: Random) -> Input:
        number = rng.random()
        return Input(f"number {number:.3f}", self._do_harm if number == self.seventh else _nothing)

    @property
    def seventh(self) -> float:
        return Random(f"{self.name} 1 7").random()

    async def _do_harm(self) -> Outcome:
        if self._harm == "ends":
            self.watched.kill()
            self.watched.wait()
        elif self._harm == "hangs":
            await asyncio.Event().wait()
        elif self._harm == "errs":
            raise Violation("a wrong answer")
        return Outcome.ANSWERED

    async def bystander(self) -> None:
        """Nobody else is there."""

    async def newcomer(self) -> None:
        """Nor comes."""


async def _nothing() -> Outcome:
    return Outcome.CLOSED


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        ("ends", "the process ended with status -9"),
        ("hangs", "input 7 has no end"),
        ("errs", "a wrong answer"),
    ],
)
async def test_a_finding_names_its_input(
    harm: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "INPUT_DEADLINE_S", 0.2)
    report = await run(Defective(harm), 0, 20, 5)
    finding = report.finding
    assert finding is not None
    assert found in str(finding)
    assert (finding.start, finding.num_inputs) == (7, 1)
    assert finding.command in as_text(report)
    again = (await run(Defective(harm), 7, 1, 5)).finding
    assert again is not None
    assert (again.kinds, again.command) == (finding.kinds, finding.command)
    assert (await run(Defective(harm), 8, 20, 5)).finding is None


@pytest.mark.parametrize(
    ("bound", "value", "found"),
    [
        ("MAX_JUMP_NBYTES", -(2**40), "more memory for a moment"),
        ("MAX_FILLING_NBYTES", -(2**40), "keeps them"),
        ("MAX_GROWTH_NBYTES", -(2**40), "grown"),
        ("SPARE_FDS", -1000, "descriptors"),
        ("SPARE_THREADS", -1000, "threads"),
    ],
)
async def test_memory_descriptors_and_threads_are_bounded(
    bound: str, value: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "SETTLE_DEADLINE_S", 0.05)
    monkeypatch.setattr(campaign, "BATCH_INPUTS", 5)
    monkeypatch.setattr(campaign, "GROWN_UP_INPUTS", 0)
    monkeypatch.setattr(campaign, bound, value)
    finding = (await run(Defective("nothing"), 0, 10, 5)).finding
    assert finding is not None
    assert found in finding.what


def test_inputs_are_the_same_in_every_run(deployment: Deployment) -> None:
    first, second = (TARGETS["edge-cloud"](deployment) for _ in range(2))
    kinds = [
        [target.make(Random(f"x {index}")).kind for index in range(50)]
        for target in (first, second)
    ]
    assert kinds[0] == kinds[1]
    assert len(set(kinds[0])) > 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m tests.fuzz.daemons --inputs 20000 --seed 1" in capsys.readouterr().out
