"""A program's daemons end with it, however it ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

PATIENCE_S = 30.0
STARTS_ONE = """
import time
from privatelora.cli._daemons import Daemon
with Daemon("http.server", "0", "--bind", "127.0.0.1") as daemon:
    print(daemon.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of it")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGALRM, signal.SIGINT])
def test_daemons_end_with_the_program(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_ONE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as program:
        assert program.stdout is not None
        pidfd = os.pidfd_open(int(program.stdout.readline()))
        try:
            assert not select.select([pidfd], [], [], 0)[0]
            program.send_signal(number)
            assert select.select([pidfd], [], [], PATIENCE_S)[0]
        finally:
            os.close(pidfd)
