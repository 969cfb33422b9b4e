"""A small deployment to give bad input to, and what came of it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from privatelora.runtime.wire.codec import decode
from privatelora.runtime.wire.messages import ErrorCode, ErrorReply
from privatelora.runtime.wire.prelude import WireLimits
from tests.e2e.deployment import Deployment, split_checkpoint
from tests.e2e.processes import EDGE, MAIN, PATIENCE_S, SERVE, Commands, Process
from tests.partition.shards import Result
from tests.partition.tiny import save_tiny

RANKS = ("--rank-up", 8, "--rank-down", 8, "--basis", "random")
TRANSPORT_HEADER = struct.Struct("<4sI")
REQUEST = '{"prompt": "The weather", "sampling": {"max_tokens": 4}}\n'


class Seen(NamedTuple):
    """What came of a bad input. ``code`` is None for a daemon that went on."""

    program: str
    code: int | None
    line: str
    """The one line on standard error, or a daemon's warning without its time."""


class Bench:
    """A tiny model, its shards and, as a context, a cloud that serves them, for all cases."""

    cloud: Process
    address: str

    def __init__(self, directory: Path, commands: Commands) -> None:
        self.directory = directory
        self.commands = commands
        self.model = save_tiny("llama", directory / "model")
        self.good = self._split("good", self.model)
        self._num_cases = 0
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Self:
        config = self.good.cloud_yaml("bench.yaml", max_frame_mib=1)
        with contextlib.ExitStack() as stack:
            self.cloud = stack.enter_context(Process(SERVE, config))
            self.address = self.cloud.read_ready()
            self._ending = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._ending:
            self.cloud.terminate()
            assert self.cloud.wait() == 0, self.cloud.stderr

    def _split(self, name: str, model: Path, **options: Any) -> Deployment:
        sizes = {"rank_up": 8, "rank_down": 8}
        return split_checkpoint(str(model), self.directory / name, **{**sizes, **options})

    def fresh(self) -> Path:
        """An empty directory."""
        self._num_cases += 1
        path = self.directory / f"case-{self._num_cases}"
        path.mkdir()
        return path

    def copy_of_model(self, **save_options: Any) -> Path:
        """A model directory that may be damaged."""
        return save_tiny("llama", self.fresh() / "model", **save_options)

    def copy_of_shards(self) -> Deployment:
        """A deployment that may be damaged."""
        path = self.fresh() / "shards"
        shutil.copytree(self.good.directory, path)
        return Deployment(path, self.good.plan, self.good.basis, self.good.adapter)

    def other_shards(self, name: str) -> Deployment:
        """A deployment of another model, plan or basis than the cloud's."""
        if name == "model":
            model = save_tiny("llama", self.fresh() / "model", seed=7)
            return self._split("other-model", model)
        if name == "plan":
            return self._split("other-plan", self.model, edge_first=1)
        return self._split("other-basis", self.model, basis="svd")

    def partition(self, model: object, *options: object) -> Seen:
        """Run ``privatelora partition``, which must leave nothing behind."""
        out = self.fresh() / "out"
        result = self.commands.run(MAIN, "partition", model, out, *(options or RANKS))
        assert not out.exists() or not list(out.iterdir())
        return self.seen("privatelora partition", result)

    def plan(self, text: str) -> Seen:
        """Run ``privatelora partition --plan`` with such a file."""
        path = self.fresh() / "plan.yaml"
        path.write_text(text)
        return self.partition(self.model, "--plan", path, "--basis", "random")

    def generate(self, *arguments: object) -> Seen:
        """Run ``privatelora generate``."""
        return self.seen("privatelora generate", self.commands.run(MAIN, "generate", *arguments))

    def serve(self, config: Path) -> Seen:
        """Run ``privatelora-serve``."""
        return self.seen("privatelora-serve", self.commands.run(SERVE, config))

    def edge(self, config: Path) -> Seen:
        """Run ``privatelora-edge`` with a request."""
        result = self.commands.run(EDGE, "--lines", config, stdin=REQUEST)
        return self.seen("privatelora-edge", result)

    def edge_with_adapter(self, path: Path) -> Seen:
        """Run ``privatelora-edge`` with another adapter file."""
        name = f"{self.fresh().name}.yaml"
        return self.edge(self.good.edge_yaml(self.address, name, adapter=str(path)))

    def edge_at(self, address: str, **settings: Any) -> Seen:
        """Run ``privatelora-edge`` with another cloud."""
        name = f"{self.fresh().name}.yaml"
        return self.edge(self.good.edge_yaml(address, name, **settings))

    def peer_of_cloud(self, sent: bytes, reply: ErrorCode | None) -> Seen:
        """Connect to the cloud and send it bytes. Then a good edge must be served.

        ``reply``: of the ErrorReply that the cloud says, before it closes.
        """
        before = len(self.cloud.stderr)
        received = b""
        with self.connect() as connection:
            connection.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(65536):
                    received += data
        if reply is None:
            assert received == b""
        else:
            message = decode(memoryview(received)[TRANSPORT_HEADER.size :], WireLimits())
            assert isinstance(message, ErrorReply)
            assert message.code is reply
        self.serve_good_edge()
        log = self.cloud.stderr[before:]
        lines = [line.split(" ", 2)[2] for line in log.splitlines()]
        assert len(lines) == 1, log
        return Seen("privatelora-serve", None, self._short(lines[0]))

    def connect(self) -> socket.socket:
        """A bare connection to the cloud."""
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        return socket.create_connection((host, int(port)), PATIENCE_S)

    def serve_good_edge(self) -> None:
        """An edge as it should be gets its answer."""
        config = self.good.edge_yaml(self.address)
        result = self.commands.run(EDGE, "--lines", config, stdin=REQUEST)
        assert (result.code, result.err) == (0, "")
        assert '"event": "done"' in result.out
        assert self.cloud.is_running

    def seen(self, program: str, result: Result) -> Seen:
        """What a command left, which must be one line on standard error."""
        assert "Traceback" not in result.err, result.err
        assert result.err.count("\n") == 1, result.err or result.out
        return Seen(program, result.code, self._short(result.err.rstrip("\n")))

    def _short(self, line: str) -> str:
        return line.replace(f"{self.directory}/", "")


@dataclass(frozen=True)
class Case:
    """``printed``: a part of the line; ``run`` does it."""

    name: str
    printed: str
    run: Callable[[Bench], Seen]


class Cases(list[Case]):
    """Cases of one kind."""

    def add(self, name: str, printed: str, run: Callable[[Bench], Seen]) -> None:
        """Append one."""
        self.append(Case(name, printed, run))

    def case(
        self, name: str, printed: str
    ) -> Callable[[Callable[[Bench], Seen]], Callable[[Bench], Seen]]:
        """Append the function that this decorates."""

        def decorate(run: Callable[[Bench], Seen]) -> Callable[[Bench], Seen]:
            self.add(name, printed, run)
            return run

        return decorate
