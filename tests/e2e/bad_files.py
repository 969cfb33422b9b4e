"""Bad models, plans, settings, shards, adapters and requests."""

from __future__ import annotations

import json
import os
import pickle
import socket
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from privatelora.partition.adapter import init_adapter, save_adapter
from tests.e2e.bad_input_bench import RANKS, Bench, Cases, Seen
from tests.e2e.processes import MAIN
from tests.partition.test_checkpoint_gguf import write_gguf

CASES = Cases()

# The model.


@CASES.case("model without weights", "holds no weights: expected model.safetensors")
def _no_weights(bench: Bench) -> Seen:
    model = bench.copy_of_model()
    (model / "model.safetensors").unlink()
    return bench.partition(model)


@CASES.case("safetensors file of a sharded model missing", "which is missing from")
def _missing_part(bench: Bench) -> Seen:
    model = bench.copy_of_model(sharded=True)
    (model / "model-00002-of-00003.safetensors").unlink()
    return bench.partition(model)


@CASES.case("safetensors file cut short", "is truncated or damaged")
def _cut_short(bench: Bench) -> Seen:
    model = bench.copy_of_model()
    os.truncate(model / "model.safetensors", 100_000)
    return bench.partition(model)


@CASES.case("safetensors file of random bytes", "is truncated or damaged")
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


@CASES.case(".bin that would execute code", "executed")
def _harmful_bin(bench: Bench) -> Seen:
    model = bench.copy_of_model(safe=False)
    trap = model / "trap"
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "extra": Harmful(trap)}, model / "pytorch_model.bin")
    seen = bench.partition(model)
    assert not trap.exists()
    return seen


@CASES.case(".bin that is a bare pickle with code", "executed")
def _harmful_pickle(bench: Bench) -> Seen:
    model = bench.copy_of_model(safe=False)
    trap = model / "trap"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(trap)))
    seen = bench.partition(model)
    assert not trap.exists()
    return seen


@CASES.case("unsupported architecture", "supported: llama, mistral, qwen2, qwen3")
def _unsupported(bench: Bench) -> Seen:
    model = bench.copy_of_model()
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (model / "config.json").write_text(json.dumps(config))
    return bench.partition(model)


CASES.add("model that does not exist", "nowhere does not exist", lambda b: b.partition("/nowhere"))
CASES.add(
    "package that is not installed",
    "is not installed; run: pip install",
    lambda b: b.partition("pypi:no-such-model"),
)


@CASES.case(
    "GGUF file cut short", "truncated: blk.0.attn_output.weight ends at byte 106080 of 100000"
)
def _gguf_cut_short(bench: Bench) -> Seen:
    path = write_gguf(bench.fresh() / "model.gguf")
    os.truncate(path, 100_000)
    return bench.partition(path)


@CASES.case("model without a tokenizer", "holds no tokenizer: expected one of tokenizer.json")
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
    CASES.add(f"plan with `{_text}`", _printed, partial(Bench.plan, text=_text))
CASES.add(
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
    (
        "edge",
        "{cloud: 'tcp://h:1', shard: a, payload: {dwn: fp16}}",
        "did you mean down?",
    ),
    (
        "edge",
        "{cloud: 'tcp://h:1', shard: a, sampling: {temperature: hot}}",
        "sampling.temperature: Input should be a valid number",
    ),
    ("edge", "cloud: 'a", "not valid YAML"),
    ("edge", "{cloud: 'tcp://h:1', shard: 7}", "shard: Input is not a valid path"),
):
    CASES.add(f"{_kind} settings `{_text}`", _printed, partial(_settings, kind=_kind, text=_text))


def _check(bench: Bench, text: str) -> Seen:
    path = bench.fresh() / "checked.yaml"
    path.write_text(text)
    result = bench.commands.run(MAIN, "config", "check", path)
    return bench.seen("privatelora config check", result)


for _text, _printed in (
    ("{listn: 'tcp://127.0.0.1:0', shard: a}", "unknown key 'listn'; did you mean listen?"),
    ("{cloud: 'tcp://127.0.0.1:1', shard: a}", "checked.yaml: shard: "),
    ("{rank_up: 8, layers: 7-3}", "layers: '7-3' is empty"),
    ("weather: fine", "neither a cloud's file (listen: ...) nor an edge's (cloud: ...)"),
):
    CASES.add(f"`config check` of `{_text}`", _printed, partial(_check, text=_text))
CASES.add(
    "`config check` of a file that does not exist",
    "cannot read nowhere.yaml: No such file or directory",
    lambda b: b.seen(
        "privatelora config check",
        b.commands.run(MAIN, "config", "check", b.directory / "nowhere.yaml"),
    ),
)
for _kind in ("cloud", "edge"):
    CASES.add(
        f"{_kind} settings that do not exist",
        "cannot read nowhere.yaml: No such file or directory",
        partial(_without_settings, kind=_kind),
    )

# Tokens.


def _tokens(bench: Bench, text: str) -> Seen:
    path = bench.fresh() / "tokens.yaml"
    path.write_text(text)
    return bench.serve(bench.good.cloud_yaml("tokens-cloud.yaml", tokens=str(path)))


for _name, _text, _printed in (
    ("without any", "", "0 tokens; 1 to 10000 are possible, and privatelora keys token NAME makes"),
    ("that is a list", "- alice", "expected keys and values, such as 'alice: ...'"),
    ("with a token itself", f"alice: {'t' * 43}", "alice: not a SHA-256 digest of 64 lower-case"),
    ("with a name of blanks", f"al ice: {'a' * 64}", "'al ice' cannot name a client; use up to 64"),
    ("with one token twice", f"a: {'a' * 64}\nb: {'a' * 64}", "a and b have the same token"),
):
    CASES.add(f"tokens file {_name}", _printed, partial(_tokens, text=_text))
CASES.add(
    "tokens file that does not exist",
    "cannot read nowhere.yaml: No such file or directory",
    lambda b: b.serve(
        b.good.cloud_yaml("no-tokens.yaml", tokens=str(b.directory / "nowhere.yaml"))
    ),
)


def _token(bench: Bench, text: str, cloud: str) -> Seen:
    path = bench.fresh() / "alice.token"
    path.write_text(text)
    return bench.edge_at(cloud, token={"file": str(path)})


for _name, _text, _cloud, _printed in (
    (
        "to a far cloud in the clear",
        "t",
        "tcp://192.0.2.7:1",
        "would go to tcp://192.0.2.7:1 unenc",
    ),
    ("that is empty", "\n", "tls://192.0.2.7:1", "there is no secret in"),
    ("of two words", "a b", "tls://192.0.2.7:1", "token is not 1 to 256 printable ASCII"),
):
    CASES.add(f"edge with a token {_name}", _printed, partial(_token, text=_text, cloud=_cloud))
CASES.add(
    "edge with a token from nowhere",
    "cannot read the secret in nowhere.token: No such file or directory",
    lambda b: b.edge_at(b.address, token={"file": str(b.directory / "nowhere.token")}),
)
CASES.add(
    "edge with the token in its settings",
    "token: Input should be a valid dictionary",
    lambda b: b.edge_at(b.address, token="t" * 43),
)

# Addresses.

CASES.add(
    "port in use",
    "address already in use; stop the program that listens there",
    lambda b: b.serve(b.good.cloud_yaml("in-use.yaml", listen=b.address)),
)
CASES.add(
    "scheme to listen on that is unknown",
    "no transport serves quic://; known schemes: inproc, shm, tcp",
    lambda b: b.serve(b.good.cloud_yaml("scheme.yaml", listen="quic://127.0.0.1:1")),
)
CASES.add(
    "address without a scheme",
    "it must start with a scheme and '://'",
    lambda b: b.serve(b.good.cloud_yaml("address.yaml", listen="127.0.0.1:18230")),
)
CASES.add(
    "scheme of the cloud unknown",
    "no transport serves quic://; known schemes: inproc, shm, tcp",
    lambda b: b.edge_at("quic://127.0.0.1:1"),
)


CASES.add(
    "`status` of what is no address",
    "is neither a YAML file nor an address such as 127.0.0.1:18231",
    lambda b: b.seen("privatelora status", b.commands.run(MAIN, "status", "somewhere")),
)


@CASES.case("`status` where nobody is", "nothing tells its status at http://127.0.0.1:")
def _no_status(bench: Bench) -> Seen:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    return bench.seen("privatelora status", bench.commands.run(MAIN, "status", address))


@CASES.case("cloud not there", "connection refused; check that the peer is running")
def _not_there(bench: Bench) -> Seen:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return bench.edge_at(f"tcp://127.0.0.1:{port}")


@CASES.case(
    "`privatelora chat`, cloud not there", "connection refused; check that the peer is running"
)
def _no_chat(bench: Bench) -> Seen:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    config = bench.good.edge_yaml(address, "chat.yaml")
    return bench.seen("privatelora chat", bench.commands.run(MAIN, "chat", config))


# Shards.


def _other_shards(bench: Bench, what: str) -> Seen:
    return bench.edge(bench.other_shards(what).edge_yaml(bench.address))


for _what in ("model", "plan", "basis"):
    CASES.add(
        f"edge shard of another {_what} than the cloud's",
        f"cloud and edge differ in {_what} (cloud ",
        partial(_other_shards, what=_what),
    )


@CASES.case("edge shard given to the cloud", "is the edge shard; the cloud needs the cloud shard")
def _wrong_side(bench: Bench) -> Seen:
    return bench.serve(bench.good.cloud_yaml("wrong-side.yaml", shard="edge"))


@CASES.case("folder above the shard", "is not a shard: it has no manifest.json; did you mean")
def _above(bench: Bench) -> Seen:
    return bench.serve(bench.good.cloud_yaml("above.yaml", shard="."))


@CASES.case("shard cut short", "is damaged, cut short, or not a safetensors file")
def _shard_cut_short(bench: Bench) -> Seen:
    shards = bench.copy_of_shards()
    os.truncate(shards.cloud_shard / "model.safetensors", 100_000)
    return bench.serve(shards.cloud_yaml())


@CASES.case("shard with one bit changed", "is damaged; copy the shard again")
def _shard_changed(bench: Bench) -> Seen:
    shards = bench.copy_of_shards()
    path = shards.cloud_shard / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return bench.serve(shards.cloud_yaml())


@CASES.case("shard without its tensors", "No such file or directory")
def _shard_without(bench: Bench) -> Seen:
    shards = bench.copy_of_shards()
    (shards.edge_shard / "model.safetensors").unlink()
    return bench.edge(shards.edge_yaml(bench.address))


# Adapters.


@CASES.case("adapter for another basis", "was made for basis")
def _other_basis(bench: Bench) -> Seen:
    good, path = bench.good.adapter, bench.fresh() / "adapter.safetensors"
    save_adapter(path, init_adapter(good.plan, "0" * 64, good.model_fingerprint))
    return bench.edge_with_adapter(path)


@CASES.case("adapter for another model", "was made for model")
def _other_model(bench: Bench) -> Seen:
    good, path = bench.good.adapter, bench.fresh() / "adapter.safetensors"
    save_adapter(path, init_adapter(good.plan, good.basis_fingerprint, "0" * 64))
    return bench.edge_with_adapter(path)


@CASES.case("adapter for another arrangement", "every is 2 there and 1 in the shard")
def _other_arrangement(bench: Bench) -> Seen:
    good, path = bench.good.adapter, bench.fresh() / "adapter.safetensors"
    plan = good.plan.model_copy(update={"every": 2})
    save_adapter(path, init_adapter(plan, good.basis_fingerprint, good.model_fingerprint))
    return bench.edge_with_adapter(path)


@CASES.case("adapter cut short", "is damaged, cut short, or not a safetensors file")
def _adapter_cut_short(bench: Bench) -> Seen:
    path = bench.fresh() / "adapter.safetensors"
    path.write_bytes(bench.good.adapter_file.read_bytes()[:-100])
    return bench.edge_with_adapter(path)


@CASES.case("another safetensors file as adapter", "is not a PrivateLoRA adapter; make one with")
def _no_adapter(bench: Bench) -> Seen:
    path = bench.fresh() / "adapter.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    return bench.edge_with_adapter(path)


CASES.add(
    "adapter that does not exist",
    "nowhere.safetensors does not exist",
    lambda b: b.edge_with_adapter(b.directory / "nowhere.safetensors"),
)


@CASES.case("adapter for another basis, unsplit", "was made for basis")
def _generate_other_basis(bench: Bench) -> Seen:
    return bench.generate(bench.model, "a", "--adapter", bench.good.adapter_file)


# Requests, devices and results.

CASES.add(
    "`device: cuda` without one",
    "device cuda: no CUDA device is available here; use cpu",
    lambda b: b.serve(b.good.cloud_yaml("cuda.yaml", device="cuda")),
)
CASES.add(
    "`generate --device cuda` without one",
    "device cuda: no CUDA device is available here; use cpu",
    lambda b: b.generate(b.model, "a", "--device", "cuda"),
)
CASES.add(
    "`generate --device gpu`",
    "device 'gpu': choose cpu, cuda or cuda:N",
    lambda b: b.generate(b.model, "a", "--device", "gpu"),
)
CASES.add(
    "prompt longer than the context",
    "tokens and the context holds 256: no room is left for an answer; shorten the prompt",
    lambda b: b.generate(b.model, "word " * 300, "--plain"),
)
CASES.add("empty prompt", "the prompt is empty", lambda b: b.generate(b.model, "", "--plain"))
CASES.add(
    "prompt that is not text",
    "the prompt is not valid Unicode at character 4",
    lambda b: b.generate(b.model, "caf\udce9", "--plain"),
)


@CASES.case(
    "`demo --json` where nothing can be written",
    "cannot write model/config.json/figures.json: model/config.json is no folder",
)
def _demo_json(bench: Bench) -> Seen:
    file = bench.model / "config.json" / "figures.json"
    return bench.seen("privatelora demo", bench.commands.run(MAIN, "demo", "--json", file))


@CASES.case("`demo --dir` where nothing can be written", "cannot write")
def _demo_directory(bench: Bench) -> Seen:
    arguments = ("demo", "--model", bench.model, "--dir", bench.model / "config.json" / "demo")
    return bench.seen("privatelora demo", bench.commands.run(MAIN, *arguments))
