"""Running this package's daemons as child processes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from privatelora.errors import PrivateLoRAError

STOP_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def num_threads_beside_another() -> int:
    """Threads for one of two daemons that share this machine: half the processors."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def _end_with_parent() -> None:
    """Ask the system to end this process when the one that started it has ended: prctl(2)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Daemon:
    """A daemon that talks in lines on its standard input and output.

    What it logs goes to this program's standard error, or to a file. Leaving the context ends it;
    on Linux so does the end of this program, whatever ends it.
    """

    def __init__(
        self,
        module: str,
        *arguments: Path | str,
        environment: Mapping[str, str] | None = None,
        log: IO[str] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        """Start ``python -m module arguments``, ``environment`` added to this one's.

        ``within``: a command that runs it somewhere else, such as in a network namespace.
        """
        self._name = module.rpartition(".")[2]
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env={**os.environ, **(environment or {})},
            preexec_fn=_end_with_parent,  # takes no lock that a thread might hold
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def read_line(self) -> str:
        """Wait for its next line; PrivateLoRAError if it ended instead."""
        pipe = self._process.stdout
        line = pipe.readline() if pipe is not None else ""
        if not line:
            status = self._process.wait()
            raise PrivateLoRAError(f"the {self._name} daemon ended with status {status}; see above")
        return line

    def read_address(self) -> str:
        """Wait until it listens; where. PrivateLoRAError if it ended instead."""
        return self.read_line().removeprefix("ready ").strip()

    def read_event(self, *expected: str) -> dict[str, Any]:
        """Wait for its next JSON event, which must be one of ``expected``."""
        event: dict[str, Any] = json.loads(self.read_line())
        if event.get("event") not in expected:
            raise PrivateLoRAError(f"{self._name}: {event.get('error', event)}")
        return event

    def write_line(self, line: str) -> None:
        """Send it one line."""
        if self._process.stdin is not None:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """Ask it to end, and make it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()
