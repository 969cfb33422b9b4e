"""This package's programs as child processes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from tests.e2e.forker import MODULES, Forked, Forker, usual_environment
from tests.partition.shards import Result

SERVE = "privatelora.cli.serve"
EDGE = "privatelora.cli.edge"
MAIN = "privatelora.cli.main"
BENCH = "privatelora.benchmarks.cli"
TRAIN = "privatelora.training.cli"

PATIENCE_S = 60
"""Longest wait for anything; a program that takes longer hangs."""

Event = dict[str, Any]


class Started(Protocol):
    """What is used of ``subprocess.Popen``, which a forked program has too."""

    @property
    def pid(self) -> int: ...
    @property
    def stdin(self) -> IO[bytes] | None: ...
    @property
    def stdout(self) -> IO[bytes] | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: signal.Signals) -> None: ...
    def kill(self) -> None: ...


@functools.cache
def shared_forker() -> Forker:
    """The one that every test of this run uses; ends with it."""
    forker = Forker().__enter__()
    atexit.register(forker.__exit__, None, None, None)
    return forker


class Process:
    """A program that talks in lines on its standard input and output.

    Leaving the context kills it if it still runs.
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        environment: dict[str, str] | None = None,
        stderr: Path | None = None,
        is_fresh: bool = False,
    ) -> None:
        """Start ``python -m module arguments``, with ``environment`` added to the usual one.

        ``stderr``: a file for its standard error, instead of one that can be read here.
        ``is_fresh``: in an interpreter of its own, as people start it, not in a forked one that
        has imported everything.
        """
        # Closed when the context is left.
        file = tempfile.TemporaryFile() if stderr is None else stderr.open("wb")  # noqa: SIM115
        self._stderr: IO[bytes] = file
        self._process: Started
        if is_fresh or environment or module not in MODULES:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**usual_environment(), **(environment or {})},
            )
        else:
            self._process = Forked(shared_forker(), module, *arguments, stderr=file)
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    @property
    def stderr(self) -> str:
        """All it has printed on standard error so far."""
        # By its own offset: the child writes through the same file description.
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def read_line(self) -> str:
        """Wait for its next line of output."""
        line = self._lines.get(timeout=PATIENCE_S)
        assert line, f"it ended with status {self.wait()}: {self.stderr}"
        return line.decode()

    def read_event(self) -> Event:
        """Wait for its next line, which is JSON."""
        event: Event = json.loads(self.read_line())
        return event

    def read_ready(self) -> str:
        """Wait until a cloud can be connected to; its address."""
        word, address = self.read_line().split()
        assert word == "ready"
        return address

    def read_rest(self) -> list[str]:
        """Every line until it ends its output."""
        return [line.decode() for line in iter(lambda: self._lines.get(timeout=PATIENCE_S), b"")]

    def write(self, *lines: str | bytes | dict[str, Any]) -> None:
        """Give it lines; an object becomes a line of JSON."""
        assert self._process.stdin is not None
        for line in lines:
            text = json.dumps(line) if isinstance(line, dict) else line
            data = text if isinstance(text, bytes) else text.encode()
            self._process.stdin.write(data + b"\n")
        self._process.stdin.flush()

    def end_input(self) -> None:
        """Let it see the end of its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def ask(self, request: dict[str, Any]) -> tuple[list[Event], Event]:
        """Send a request; the text events of its answer and the last event."""
        self.write(request)
        return self.read_answer()

    def read_answer(self) -> tuple[list[Event], Event]:
        """The text events of one answer and the last event, ``done`` or ``error``."""
        texts = []
        while (event := self.read_event())["event"] == "text":
            texts.append(event)
        return texts, event

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end; its exit status."""
        return self._process.wait(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            assert file is not None
            try:
                file.close()
            except BrokenPipeError:  # what it was given and did not read
                continue


class Commands:
    """Runs commands to their end, each in a process of its own, forked from one for all."""

    def run(
        self, module: str, *arguments: object, stdin: str = "", directory: Path | None = None
    ) -> Result:
        """Run ``python -m module arguments``, in ``directory`` if given.

        A status below 0 is the signal that ended it.
        """
        forker = shared_forker()
        with tempfile.TemporaryDirectory(prefix="privatelora-command-") as streams:
            files = {name: f"{streams}/{name}" for name in ("stdin", "stdout", "stderr")}
            with open(files["stdin"], "w", encoding="utf-8") as file:
                file.write(stdin)
            where = None if directory is None else str(directory)
            pid = forker.start(module, *arguments, **files, directory=where, limit_s=PATIENCE_S)
            code = forker.wait(pid)
            texts = []
            for name in ("stdout", "stderr"):
                with open(files[name], encoding="utf-8") as file:
                    texts.append(file.read())
        return Result(code, *texts)
