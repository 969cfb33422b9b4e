"""Starts programs by forking a process that has imported what they need.

A daemon is then there in a fraction of a second, which is what most of a killed one's absence
would be. Standard input has a request a line, in JSON; standard output gets its answer.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from tests.e2e.fork_server import MODULES, USED_BY_THEM, run
from tests.e2e.processes import usual_environment


class Forker:
    """Leaving the context kills everything that it has started and that still runs."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.forker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=usual_environment(),
            start_new_session=True,  # Ctrl-C is for whoever started this, who then ends its input
        )
        return self

    def start(self, module: str, *arguments: object, stdout: str, stderr: str) -> int:
        """Start ``python -m module arguments``; its process id. The files are made anew."""
        job = {
            "module": module,
            "arguments": list(map(str, arguments)),
            "directory": os.getcwd(),
            "stdin": os.devnull,
            "stdout": stdout,
            "stderr": stderr,
            "limit_s": 0,
        }
        return int(self._ask({"start": job}))

    def status(self, pid: int) -> int:
        """Exit status of a process that has ended; below 0 is the signal that ended it."""
        return int(self._ask({"status": pid}))

    def _ask(self, request: dict[str, Any]) -> Any:
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
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


def main() -> None:
    """Answer requests until the input ends."""
    # Copies: the programs get these descriptors, and standard streams that nobody has used.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for name in (*MODULES, *USED_BY_THEM, "privatelora.runtime.http.server"):
        importlib.import_module(name)
    running: set[int] = set()
    for line in requests:
        request = json.loads(line)
        if "start" in request:
            child = os.fork()
            if child == 0:
                requests.close()
                answers.close()
                run(request["start"])
            running.add(child)
            answer = child
        else:
            _, status = os.waitpid(request["status"], 0)
            running.discard(request["status"])
            answer = os.waitstatus_to_exitcode(status)
        answers.write(b"%d\n" % answer)
        answers.flush()
    for child in running:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
