"""Runs commands, each in a process forked from this one, which has imported what they need.

Standard input has one job a line, in JSON; standard output gets each one's exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

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
    "privatelora.runtime.line_service",
    "privatelora.runtime.unsplit",
    "privatelora.training.run",
    "rich.console",
    "transformers.models.llama.modeling_llama",  # by its AutoTokenizer
    "uvloop",
)


def serve() -> None:
    """Run jobs until the input ends."""
    # Copies: the commands get these descriptors, and standard streams that nobody has used.
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for name in MODULES + USED_BY_THEM:
        importlib.import_module(name)
    for line in jobs:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        _, status = os.waitpid(child, 0)
        answers.write(b"%d\n" % os.waitstatus_to_exitcode(status))
        answers.flush()


def run(job: dict[str, Any]) -> None:
    """Become the command; never returns."""
    code = 1
    try:
        signal.alarm(job["limit_s"])
        os.chdir(job["directory"])
        for descriptor, (name, flags) in enumerate(
            (
                ("stdin", os.O_RDONLY),
                ("stdout", os.O_WRONLY | os.O_CREAT),
                ("stderr", os.O_WRONLY | os.O_CREAT),
            )
        ):
            os.dup2(os.open(job[name], flags, 0o600), descriptor)
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
    serve()
