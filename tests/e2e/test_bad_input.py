"""Every bad input gets one clear line, and daemons live on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from privatelora.runtime.wire.messages import Role
from tests.e2e.bad_input import CASES
from tests.e2e.bad_input_bench import Bench, Case
from tests.e2e.bad_peers import TOO_LARGE, hello
from tests.e2e.processes import Commands


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("bad-input"), commands) as made:
        yield made


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


def test_peers_that_stop_in_the_middle_hinder_nobody(bench: Bench) -> None:
    """Silent from the start, within a header, and within a first message."""
    before = bench.cloud.stderr
    with bench.connect(), bench.connect() as in_header, bench.connect() as in_message:
        in_header.sendall(TOO_LARGE[:5])
        in_message.sendall(hello(Role.EDGE)[:-7])
        bench.serve_good_edge()
    bench.serve_good_edge()
    assert bench.cloud.stderr == before
