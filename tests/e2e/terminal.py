"""A program in a terminal: what is typed to it, and what it shows."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from types import TracebackType
from typing import Self

from tests.e2e.processes import PATIENCE_S, usual_environment


def _take_terminal() -> None:
    """Make standard input the terminal that sends signals to this process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """``python -m module arguments`` with a terminal of its own. Leaving the context kills it."""

    def __init__(self, module: str, *arguments: object, environment: dict[str, str]) -> None:
        self._master, inner = pty.openpty()
        # Nobody here answers when a program asks where the cursor is.
        plain = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env={**usual_environment(), **plain, **environment},
        )
        os.close(inner)
        self._shown = ""

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read_until(self, expected: str) -> str:
        """Wait until it has shown ``expected``; all it has shown since the last time."""
        deadline = time.monotonic() + PATIENCE_S
        while expected not in self._shown:
            assert self._read(deadline), f"{expected!r} did not come: {self._shown!r}"
        end = self._shown.index(expected) + len(expected)
        shown, self._shown = self._shown[:end], self._shown[end:]
        return shown

    def read_more(self, num_chars: int) -> None:
        """Wait until it has shown so many characters since the last time."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self._shown) < num_chars:
            assert self._read(deadline), f"no more came than {self._shown!r}"
        self._shown = self._shown[num_chars:]

    def _read(self, deadline: float) -> bool:
        """Wait for more; False if nothing came."""
        left_s = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([self._master], [], [], left_s)
        if ready:
            self._shown += os.read(self._master, 65536).decode(errors="replace")
        return bool(ready)

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
        os.close(self._master)
