"""Every bad input gets one clear line, and daemons live on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.bad_input import CASES, Bench, Case
from tests.e2e.processes import Commands


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("bad-input"), commands)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_gets_one_clear_line(bench: Bench, case: Case) -> None:
    program, code, line = case.run(bench)
    assert case.printed in line
    if code is None:
        assert line.startswith("WARNING ")
    else:
        assert code == 1, program
        assert line.startswith("error: ")
        assert line.count("error: ") == 1
