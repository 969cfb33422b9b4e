"""Starts programs by forking a process that has imported what they need.

Imports take most of the time of a command that ends in an error, and of the start of a daemon.
Standard input has a request a line, in JSON; standard output gets its answer.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO, Self

MODULES = (
    "privatelora.cli.main",
    "privatelora.cli.serve",
    "privatelora.cli.edge",
    "privatelora.benchmarks.cli",
    "privatelora.training.cli",
)
USED_BY_THEM = (
    "privatelora.benchmarks.overhead",
    "privatelora.partition.published",
    "privatelora.partition.split",
    "privatelora.runtime.cloud",
    "privatelora.runtime.edge",
    "privatelora.runtime.http.server",
    "privatelora.runtime.line_service",
    "privatelora.runtime.unsplit",
    "privatelora.training.run",
    "rich.console",
    "transformers.models.llama.modeling_llama",  # by its AutoTokenizer
    "uvloop",
)
STREAMS = (
    ("stdin", os.O_RDONLY),
    ("stdout", os.O_WRONLY | os.O_CREAT),
    ("stderr", os.O_WRONLY | os.O_CREAT),
)


def usual_environment() -> dict[str, str]:
    """This process' environment for children: one thread each, no GPU, no network, no colours."""
    changes = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "100",
    }
    return {**os.environ, **changes}


class Forker:
    """Leaving the context kills everything that it has started and that still runs."""

    def __enter__(self) -> Self:
        self._asking = threading.Lock()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.forker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=usual_environment(),
            start_new_session=True,  # Ctrl-C is for whoever started this, who then ends its input
        )
        return self

    def start(
        self,
        module: str,
        *arguments: object,
        stdout: str,
        stderr: str,
        stdin: str = os.devnull,
        directory: str | None = None,
        limit_s: int = 0,
    ) -> int:
        """Start ``python -m module arguments``; its process id.

        Its streams are files, open when this returns. ``limit_s``: of its life; 0 is none.
        """
        job = {
            "module": module,
            "arguments": list(map(str, arguments)),
            "directory": directory or os.getcwd(),
            "stdin": stdin,
            "stdout": stdout,
            "stderr": stderr,
            "limit_s": limit_s,
        }
        return int(self._ask({"start": job}))

    def status(self, pid: int) -> int:
        """Exit status of a process that has ended; below 0 is the signal that ended it."""
        return int(self._ask({"status": pid}))

    def wait(self, pid: int) -> int:
        """Its exit status when it ends; others can be started meanwhile."""
        pidfd = os.pidfd_open(pid)
        try:
            select.select([pidfd], [], [])
        finally:
            os.close(pidfd)
        return self.status(pid)

    def _ask(self, request: dict[str, Any]) -> Any:
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
        with self._asking:
            server.stdin.write(json.dumps(request).encode() + b"\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._server.communicate()


class Forked:
    """A program of a Forker with pipes, as ``subprocess.Popen`` has it."""

    def __init__(self, forker: Forker, module: str, *arguments: object, stderr: BinaryIO) -> None:
        """Start it; ``stderr`` is written to through a description of its own."""
        self._forker = forker
        their_input, our_input = os.pipe()
        our_output, their_output = os.pipe()
        ours = f"/proc/{os.getpid()}/fd"
        try:
            self.pid = forker.start(
                module,
                *arguments,
                stdin=f"{ours}/{their_input}",
                stdout=f"{ours}/{their_output}",
                stderr=f"{ours}/{stderr.fileno()}",
            )
        finally:
            os.close(their_input)
            os.close(their_output)
        self._pidfd: int | None = os.pidfd_open(self.pid)
        self.stdin = os.fdopen(our_input, "wb")
        self.stdout = os.fdopen(our_output, "rb")
        self._status = 0

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        if self._pidfd is not None:
            if not select.select([self._pidfd], [], [], 0)[0]:
                return None
            self._status = self._forker.status(self.pid)
            os.close(self._pidfd)
            self._pidfd = None
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Exit status when it has ended. Raises subprocess.TimeoutExpired."""
        if self._pidfd is not None and not select.select([self._pidfd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal if it still runs."""
        if self.poll() is None and self._pidfd is not None:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """End it, if it still runs."""
        self.send_signal(signal.SIGKILL)


def main() -> None:
    """Answer requests until the input ends."""
    # Copies: the programs get these descriptors, and standard streams that nobody has used.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for name in (*MODULES, *USED_BY_THEM):
        importlib.import_module(name)
    running: set[int] = set()
    for line in requests:
        request = json.loads(line)
        if "start" in request:
            job = request["start"]
            streams = [os.open(job[name], flags, 0o600) for name, flags in STREAMS]
            answer = os.fork()
            if answer == 0:
                requests.close()
                answers.close()
                run(job, streams)
            for descriptor in streams:
                os.close(descriptor)
            running.add(answer)
        else:
            _, status = os.waitpid(request["status"], 0)
            running.discard(request["status"])
            answer = os.waitstatus_to_exitcode(status)
        answers.write(b"%d\n" % answer)
        answers.flush()
    for child in running:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def run(job: dict[str, Any], streams: list[int]) -> None:
    """Become the program; never returns."""
    code = 1
    try:
        signal.alarm(job["limit_s"])
        os.chdir(job["directory"])
        for descriptor, opened in enumerate(streams):
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.argv = [job["module"], *job["arguments"]]
        # Its help and usage name the program by this.
        program = sys.modules["__main__"] = importlib.import_module(job["module"])
        try:
            program.main()
        except SystemExit as error:
            code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
