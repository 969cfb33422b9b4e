"""Every kind of bad input, and the one clear line that it must lead to.

``CASES`` is what ``test_bad_input`` runs and what ``bad_input_table`` prints. A case gives a
program something bad, in a process of its own, and returns what came of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import save_file

from privatelora.partition.adapter import init_adapter, save_adapter
from privatelora.runtime.payload.codec import CODEC_NAMES
from privatelora.runtime.wire.codec import decode, encode
from privatelora.runtime.wire.messages import ErrorCode, ErrorReply, Fingerprints, Hello, Role
from privatelora.runtime.wire.prelude import WireLimits
from tests.e2e.deployment import Deployment, split_checkpoint
from tests.e2e.processes import EDGE, MAIN, PATIENCE_S, SERVE, Commands, Process
from tests.partition.shards import Result
from tests.partition.test_checkpoint_gguf import write_gguf
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
        result = self.commands.run(EDGE, config, stdin=REQUEST)
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
        result = self.commands.run(EDGE, self.good.edge_yaml(self.address), stdin=REQUEST)
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


CASES: list[Case] = []


def case(name: str, printed: str) -> Callable[[Callable[[Bench], Seen]], Callable[[Bench], Seen]]:
    """Add a function to ``CASES``."""

    def add(run: Callable[[Bench], Seen]) -> Callable[[Bench], Seen]:
        CASES.append(Case(name, printed, run))
        return run

    return add


def add(name: str, printed: str, run: Callable[[Bench], Seen]) -> None:
    """Add a case that takes one line."""
    CASES.append(Case(name, printed, run))


# The model.


@case("model without weights", "holds no weights: expected model.safetensors")
def _no_weights(bench: Bench) -> Seen:
    model = bench.copy_of_model()
    (model / "model.safetensors").unlink()
    return bench.partition(model)


@case("safetensors file of a sharded model missing", "which is missing from")
def _missing_part(bench: Bench) -> Seen:
    model = bench.copy_of_model(sharded=True)
    (model / "model-00002-of-00003.safetensors").unlink()
    return bench.partition(model)


@case("safetensors file cut short", "is truncated or damaged")
def _cut_short(bench: Bench) -> Seen:
    model = bench.copy_of_model()
    os.truncate(model / "model.safetensors", 100_000)
    return bench.partition(model)


@case("safetensors file of random bytes", "is truncated or damaged")
def _random_weights(bench: Bench) -> Seen:
    model = bench.copy_of_model()
    (model / "model.safetensors").write_bytes(os.urandom(1000))
    return bench.partition(model)


class Harmful:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@case(".bin that would execute code", "executed")
def _harmful_bin(bench: Bench) -> Seen:
    model = bench.copy_of_model(safe=False)
    trap = model / "trap"
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "extra": Harmful(trap)}, model / "pytorch_model.bin")
    seen = bench.partition(model)
    assert not trap.exists()
    return seen


@case(".bin that is a bare pickle with code", "executed")
def _harmful_pickle(bench: Bench) -> Seen:
    model = bench.copy_of_model(safe=False)
    trap = model / "trap"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(trap)))
    seen = bench.partition(model)
    assert not trap.exists()
    return seen


@case("unsupported architecture", "supported: llama, mistral, qwen2, qwen3")
def _unsupported(bench: Bench) -> Seen:
    model = bench.copy_of_model()
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (model / "config.json").write_text(json.dumps(config))
    return bench.partition(model)


add("model that does not exist", "nowhere does not exist", lambda b: b.partition("/nowhere"))
add(
    "package that is not installed",
    "is not installed; run: pip install",
    lambda b: b.partition("pypi:no-such-model"),
)


@case("GGUF file cut short", "truncated: blk.0.attn_output.weight ends at byte 106080 of 100000")
def _gguf_cut_short(bench: Bench) -> Seen:
    path = write_gguf(bench.fresh() / "model.gguf")
    os.truncate(path, 100_000)
    return bench.partition(path)


@case("model without a tokenizer", "holds no tokenizer: expected one of tokenizer.json")
def _no_tokenizer(bench: Bench) -> Seen:
    return bench.partition(bench.copy_of_model(tokenizer=False))


# The plan.

for _text, _printed in (
    ("layers: [0, 9]", "layer 9 does not exist; the model has layers 0 to 3"),
    ("rank_up: 0", "rank_up: Input should be greater than 0"),
    ("rank_down: 0", "rank_down: Input should be greater than 0"),
    ("rank_up: 65", "rank_up 65 is larger than the hidden size; choose at most 64"),
    (
        "{rank_up: 8, rank_down: 64}",
        "rank_down 64 is larger than the output of the k projection (32)",
    ),
    ("{rank_up: 8, rank_down: 8, edge_first: 3, edge_last: 1}", "leave the cloud no layer"),
    ("{rank_up: 8, rank_down: 8, edge_first: 5}", "leave the cloud no layer"),
    ("{rank_up: 8, rank_down: 8, every: 0}", "every: Input should be greater than 0"),
    ("rank: 8", "unknown key 'rank'; did you mean rank_up"),
):
    add(f"plan with `{_text}`", _printed, partial(Bench.plan, text=_text))
add(
    "`--layers 2-9` of 4 layers",
    "layer 9 does not exist",
    lambda b: b.partition(b.model, *RANKS, "--layers", "2-9"),
)

# The settings.


def _daemon(bench: Bench, kind: str, path: Path) -> Seen:
    return bench.serve(path) if kind == "cloud" else bench.edge(path)


def _settings(bench: Bench, kind: str, text: str) -> Seen:
    path = bench.fresh() / f"{kind}.yaml"
    path.write_text(text)
    return _daemon(bench, kind, path)


def _without_settings(bench: Bench, kind: str) -> Seen:
    return _daemon(bench, kind, bench.directory / "nowhere.yaml")


for _kind, _text, _printed in (
    ("cloud", "listn: x", "unknown key 'listn'; did you mean listen?"),
    (
        "cloud",
        "{listen: 'tcp://127.0.0.1:0', shard: a, max_sessions: many}",
        "max_sessions: Input should be a valid integer",
    ),
    ("cloud", "listen: [", "line 1: not valid YAML"),
    ("cloud", "listen: 2024-02-31", "not valid YAML"),
    ("cloud", "- listen", "expected keys and values, such as 'listen: ...'"),
    ("cloud", "listen: 'tcp://127.0.0.1:0'", "shard: Field required"),
    ("edge", "{cloud: 'tcp://h:1', shard: a, payload: {exchnge: fp16}}", "did you mean exchange?"),
    (
        "edge",
        "{cloud: 'tcp://h:1', shard: a, sampling: {temperature: hot}}",
        "sampling.temperature: Input should be a valid number",
    ),
    ("edge", "cloud: 'a", "not valid YAML"),
    ("edge", "{cloud: 'tcp://h:1', shard: 7}", "shard: Input is not a valid path"),
):
    add(f"{_kind} settings `{_text}`", _printed, partial(_settings, kind=_kind, text=_text))
for _kind in ("cloud", "edge"):
    add(
        f"{_kind} settings that do not exist",
        "cannot read nowhere.yaml: No such file or directory",
        partial(_without_settings, kind=_kind),
    )

# Addresses.

add(
    "port in use",
    "address already in use; stop the program that listens there",
    lambda b: b.serve(b.good.cloud_yaml("in-use.yaml", listen=b.address)),
)
add(
    "scheme to listen on that is unknown",
    "no transport serves quic://; known schemes: inproc, tcp",
    lambda b: b.serve(b.good.cloud_yaml("scheme.yaml", listen="quic://127.0.0.1:1")),
)
add(
    "address without a scheme",
    "it must start with a scheme and '://'",
    lambda b: b.serve(b.good.cloud_yaml("address.yaml", listen="127.0.0.1:18230")),
)
add(
    "scheme of the cloud unknown",
    "no transport serves quic://; known schemes: inproc, tcp",
    lambda b: b.edge_at("quic://127.0.0.1:1"),
)


@case("cloud not there", "connection refused; check that the peer is running")
def _not_there(bench: Bench) -> Seen:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return bench.edge_at(f"tcp://127.0.0.1:{port}")


@case("`privatelora chat`, cloud not there", "connection refused; check that the peer is running")
def _no_chat(bench: Bench) -> Seen:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    config = bench.good.edge_yaml(address, "chat.yaml")
    return bench.seen("privatelora chat", bench.commands.run(MAIN, "chat", config))


# Shards.


def _other_shards(bench: Bench, what: str) -> Seen:
    return bench.edge(bench.other_shards(what).edge_yaml(bench.address))


for _what in ("model", "plan", "basis"):
    add(
        f"edge shard of another {_what} than the cloud's",
        f"cloud and edge differ in {_what} (cloud ",
        partial(_other_shards, what=_what),
    )


@case("edge shard given to the cloud", "is the edge shard; the cloud needs the cloud shard")
def _wrong_side(bench: Bench) -> Seen:
    return bench.serve(bench.good.cloud_yaml("wrong-side.yaml", shard="edge"))


@case("folder above the shard", "is not a shard: it has no manifest.json; did you mean")
def _above(bench: Bench) -> Seen:
    return bench.serve(bench.good.cloud_yaml("above.yaml", shard="."))


@case("shard cut short", "is damaged, cut short, or not a safetensors file")
def _shard_cut_short(bench: Bench) -> Seen:
    shards = bench.copy_of_shards()
    os.truncate(shards.cloud_shard / "model.safetensors", 100_000)
    return bench.serve(shards.cloud_yaml())


@case("shard with one bit changed", "is damaged; copy the shard again")
def _shard_changed(bench: Bench) -> Seen:
    shards = bench.copy_of_shards()
    path = shards.cloud_shard / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return bench.serve(shards.cloud_yaml())


@case("shard without its tensors", "No such file or directory")
def _shard_without(bench: Bench) -> Seen:
    shards = bench.copy_of_shards()
    (shards.edge_shard / "model.safetensors").unlink()
    return bench.edge(shards.edge_yaml(bench.address))


# Adapters.


@case("adapter for another basis", "was made for basis")
def _other_basis(bench: Bench) -> Seen:
    good, path = bench.good.adapter, bench.fresh() / "adapter.safetensors"
    save_adapter(path, init_adapter(good.plan, "0" * 64, good.model_fingerprint))
    return bench.edge_with_adapter(path)


@case("adapter for another model", "was made for model")
def _other_model(bench: Bench) -> Seen:
    good, path = bench.good.adapter, bench.fresh() / "adapter.safetensors"
    save_adapter(path, init_adapter(good.plan, good.basis_fingerprint, "0" * 64))
    return bench.edge_with_adapter(path)


@case("adapter for another arrangement", "every is 2 there and 1 in the shard")
def _other_arrangement(bench: Bench) -> Seen:
    good, path = bench.good.adapter, bench.fresh() / "adapter.safetensors"
    plan = good.plan.model_copy(update={"every": 2})
    save_adapter(path, init_adapter(plan, good.basis_fingerprint, good.model_fingerprint))
    return bench.edge_with_adapter(path)


@case("adapter cut short", "is damaged, cut short, or not a safetensors file")
def _adapter_cut_short(bench: Bench) -> Seen:
    path = bench.fresh() / "adapter.safetensors"
    path.write_bytes(bench.good.adapter_file.read_bytes()[:-100])
    return bench.edge_with_adapter(path)


@case("another safetensors file as adapter", "is not a PrivateLoRA adapter; make one with")
def _no_adapter(bench: Bench) -> Seen:
    path = bench.fresh() / "adapter.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    return bench.edge_with_adapter(path)


add(
    "adapter that does not exist",
    "nowhere.safetensors does not exist",
    lambda b: b.edge_with_adapter(b.directory / "nowhere.safetensors"),
)


@case("adapter for another basis, unsplit", "was made for basis")
def _generate_other_basis(bench: Bench) -> Seen:
    return bench.generate(bench.model, "a", "--adapter", bench.good.adapter_file)


# Requests, devices and results.

add(
    "`device: cuda` without one",
    "device cuda: no CUDA device is available here; use cpu",
    lambda b: b.serve(b.good.cloud_yaml("cuda.yaml", device="cuda")),
)
add(
    "`generate --device cuda` without one",
    "device cuda: no CUDA device is available here; use cpu",
    lambda b: b.generate(b.model, "a", "--device", "cuda"),
)
add(
    "`generate --device gpu`",
    "device 'gpu': choose cpu, cuda or cuda:N",
    lambda b: b.generate(b.model, "a", "--device", "gpu"),
)
add(
    "prompt longer than the context",
    "tokens and the context holds 256: no room is left for an answer; shorten the prompt",
    lambda b: b.generate(b.model, "word " * 300, "--plain"),
)
add("empty prompt", "the prompt is empty", lambda b: b.generate(b.model, "", "--plain"))
add(
    "prompt that is not text",
    "the prompt is not valid Unicode at character 4",
    lambda b: b.generate(b.model, "caf\udce9", "--plain"),
)


@case("`demo --json` where nothing can be written", "cannot write nowhere/figures.json")
def _demo_json(bench: Bench) -> Seen:
    file = bench.directory / "nowhere" / "figures.json"
    return bench.seen("privatelora demo", bench.commands.run(MAIN, "demo", "--json", file))


@case("`demo --dir` where nothing can be written", "cannot write")
def _demo_directory(bench: Bench) -> Seen:
    arguments = ("demo", "--model", bench.model, "--dir", bench.model / "config.json" / "demo")
    return bench.seen("privatelora demo", bench.commands.run(MAIN, *arguments))


# Peers.


def frame(payload: bytes) -> bytes:
    """As TCP carries it."""
    return TRANSPORT_HEADER.pack(b"PLR1", len(payload)) + payload


def hello(role: Role, version: int | None = None) -> bytes:
    """A frame with the first message of a peer, which may speak another version."""
    message = Hello(role, "test", Fingerprints("a" * 64, "b" * 64, "c" * 64), CODEC_NAMES, 2**20)
    payload = bytearray(b"".join(encode(message)))
    if version is not None:
        struct.pack_into("<H", payload, 2, version)
    return frame(bytes(payload))


HTTP_REQUEST = b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"
HTTP_REPLY = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
TOO_LARGE = TRANSPORT_HEADER.pack(b"PLR1", 2**32 - 1)
ANOTHER_VERSION = "the peer speaks protocol version 2, this end version 1"

_sent: bytes
_reply: ErrorCode | None
for _name, _sent, _printed, _reply in (
    ("HTTP request to the cloud", HTTP_REQUEST, "does not send PrivateLoRA frames", None),
    ("random bytes to the cloud", bytes(range(7, 77)), "does not send PrivateLoRA frames", None),
    ("frame larger than the cloud's limit", TOO_LARGE, "over this end's limit of 1048576", None),
    ("edge of another version", hello(Role.EDGE, 2), ANOTHER_VERSION, ErrorCode.VERSION),
    ("cloud in an edge's place", hello(Role.CLOUD), "one end must be each", ErrorCode.PROTOCOL),
    (
        "frame that is no message",
        frame(b"\xff" * 100),
        "message type 255 does not exist",
        ErrorCode.PROTOCOL,
    ),
    ("empty frame", frame(b""), "a frame of 0 bytes is too short", ErrorCode.PROTOCOL),
):
    add(_name, _printed, partial(Bench.peer_of_cloud, sent=_sent, reply=_reply))


@contextlib.contextmanager
def impostor(*replies: bytes) -> Iterator[str]:
    """The address of something that is no cloud: it answers whatever comes first and closes."""

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            connection.recv(65536)
            for reply in replies:
                connection.sendall(reply)
            with contextlib.suppress(OSError):  # the edge may have left
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        finally:
            thread.join()


def _meets(bench: Bench, *, replies: tuple[bytes, ...]) -> Seen:
    with impostor(*replies) as address:
        return bench.edge_at(address)


add("cloud of another version", ANOTHER_VERSION, partial(_meets, replies=(hello(Role.CLOUD, 2),)))
add(
    "HTTP server instead of a cloud",
    "does not send PrivateLoRA frames (found b'HTTP/1.1 400 Bad'",
    partial(_meets, replies=(HTTP_REPLY,)),
)
add(
    "frame larger than the edge's limit",
    "over this end's limit of",
    partial(_meets, replies=(TOO_LARGE,)),
)
add(
    "peer that closes at once",
    "closed the connection without a greeting",
    partial(_meets, replies=()),
)


@case("peer that says nothing", "said nothing for 0.2 s; is it a PrivateLoRA cloud?")
def _silent(bench: Bench) -> Seen:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        return bench.edge_at(address, connect_timeout_s=0.2)
