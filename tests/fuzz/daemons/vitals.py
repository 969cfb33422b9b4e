"""Memory, descriptors and threads of a process, as the kernel tells."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from tests.e2e.processes import Process
from tests.fuzz.daemons.inputs import Violation

_FIELD = re.compile(r"^(VmRSS|VmHWM|Threads):\s+(\d+)", re.MULTILINE)
_DEFECTS = ("Traceback", "internal error", "never retrieved", "Exception in", "Assertion failed")
"""Marks in a log of what no input may lead to."""
_MAX_SHOWN_CHARS = 4000


class Vitals(NamedTuple):
    """``peak_nbytes``: of resident memory since ``forget_peak``."""

    resident_nbytes: int
    peak_nbytes: int
    num_threads: int
    num_fds: int

    @classmethod
    def of(cls, process: Process) -> Vitals:
        """As they are now. Raises Violation if it has ended."""
        folder = Path(f"/proc/{process.pid}")
        found = {
            name: int(value) for name, value in _FIELD.findall((folder / "status").read_text())
        }
        if "VmRSS" not in found:
            raise _ended(process)
        return cls(
            found["VmRSS"] * 1024,
            found["VmHWM"] * 1024,
            found["Threads"],
            len(os.listdir(folder / "fd")),
        )


def forget_peak(process: Process) -> None:
    """Let the peak of resident memory begin anew: proc(5), clear_refs."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def require_sound(process: Process) -> None:
    """Raise Violation if it has ended or its log tells of a defect."""
    if not process.is_running:
        raise _ended(process)
    log = process.stderr
    if mark := next((mark for mark in _DEFECTS if mark in log), None):
        start = max(0, log.index(mark) - 200)
        raise Violation(f"its log says {mark!r}: {log[start : start + _MAX_SHOWN_CHARS]}")


def _ended(process: Process) -> Violation:
    status = process.wait()
    return Violation(
        f"the process ended with status {status}: {process.stderr[-_MAX_SHOWN_CHARS:]}"
    )
