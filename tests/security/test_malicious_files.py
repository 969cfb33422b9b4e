"""Files made to harm: what is in tests/e2e/bad_files.py is damaged, this is meant.

Each ends a command with one line on standard error, in little time and memory. Commands that
would wait or fill the memory are ended by an alarm, and fail their test so.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from privatelora.errors import ConfigError, PartitionError, RequestError
from privatelora.partition.adapter import read_adapter
from privatelora.partition.basis import FileBasis, basis_shapes
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.checkpoint.gguf_header import parse_header
from privatelora.partition.plan_file import read_plan_file
from privatelora.partition.published import read_published
from privatelora.partition.shard import open_shard
from privatelora.partition.tensor_file import MAX_HEADER_NBYTES, open_tensor_file
from privatelora.partition.tokenizer import export_tokenizer, load_tokenizer
from privatelora.runtime.chat import TextModel
from privatelora.runtime.secret_config import SecretConfig
from privatelora.runtime.trace import Trace
from privatelora.yaml_file import MAX_NODES
from tests.e2e.deployment import Deployment, split_checkpoint
from tests.e2e.processes import EDGE, MAIN, SERVE, Commands
from tests.partition.shards import Result
from tests.partition.test_checkpoint_gguf import string, write_gguf
from tests.partition.tiny import save_tiny, tiny_tokenizer
from tests.security import files
from tests.security.kinds import SMALL
from tests.unit.world import world


@pytest.fixture(scope="module")
def commands() -> Commands:
    return Commands()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    directory = tmp_path_factory.mktemp("malicious")
    model = save_tiny("llama", directory / "model", **SMALL)
    return split_checkpoint(str(model), directory / "shards", rank_up=4, rank_down=4)


@pytest.fixture
def given(tmp_path: Path, good: Deployment) -> Deployment:
    """A deployment that a test may spoil."""
    shutil.copytree(good.directory, tmp_path / "given")
    return Deployment(tmp_path / "given", good.plan, good.basis, good.adapter)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model", **SMALL)


def one_line(result: Result) -> str:
    """What a command that refused something printed."""
    assert result.code == 1, (result.code, result.err)
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    line = result.err.rstrip("\n")
    assert line.isprintable()
    return line


# What is no file: a pipe that nobody writes to, a device without an end.


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


NO_FILES = [pipe, endless]


@pytest.mark.parametrize("replace", NO_FILES)
@pytest.mark.parametrize(
    ("role", "file"),
    [
        ("cloud", "manifest.json"),
        ("cloud", "model.safetensors"),
        ("edge", "manifest.json"),
        ("edge", "model.safetensors"),
        ("edge", "tokenizer/tokenizer.json"),
        ("edge", "tokenizer/special_tokens_map.json"),
    ],
)
def test_no_file_in_a_shard(
    commands: Commands, given: Deployment, role: str, file: str, replace: Callable[[Path], None]
) -> None:
    replace(given.directory / role / file)
    if role == "cloud":
        result = commands.run(SERVE, given.cloud_yaml())
    else:
        result = commands.run(EDGE, "--lines", given.edge_yaml("tcp://127.0.0.1:1"))
    assert file in one_line(result)


@pytest.mark.parametrize("replace", NO_FILES)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_no_file_in_a_model(
    commands: Commands, model: Path, tmp_path: Path, file: str, replace: Callable[[Path], None]
) -> None:
    replace(model / file)
    result = commands.run(
        MAIN, "partition", model, tmp_path / "out", "--rank-up", 4, "--rank-down", 4
    )
    line = one_line(result)
    assert file in line or "tokenizer.json" in line


@pytest.mark.parametrize("replace", NO_FILES)
def test_no_file_elsewhere(
    commands: Commands, given: Deployment, model: Path, tmp_path: Path, replace: Any
) -> None:
    for name in ("a.yaml", "a.gguf", "a.safetensors", "a.bin"):
        replace(tmp_path / name)
    index = save_tiny("llama", tmp_path / "sharded", sharded=True, **SMALL)
    replace(index / "model.safetensors.index.json")
    out = tmp_path / "out"
    edge = given.edge_yaml("tcp://127.0.0.1:1", adapter=str(tmp_path / "a.safetensors"))
    for module, arguments in (
        (SERVE, [tmp_path / "a.yaml"]),
        (EDGE, [edge]),
        (MAIN, ["config", "check", tmp_path / "a.yaml"]),
        (MAIN, ["partition", model, out, "--plan", tmp_path / "a.yaml"]),
        (MAIN, ["partition", model, out, "--basis", tmp_path / "a.safetensors"]),
        (MAIN, ["partition", tmp_path / "a.gguf", out]),
        (MAIN, ["partition", index, out]),
        (MAIN, ["adapter", "inspect", tmp_path / "a.safetensors"]),
        (MAIN, ["adapter", "import", tmp_path / "a.bin", out]),
    ):
        one_line(commands.run(module, *arguments))
    with pytest.raises(ConfigError, match="cannot read the secret"):
        SecretConfig(file=tmp_path / "a.bin").read()
    with pytest.raises(ConfigError, match="not a plain file"):
        Trace(tmp_path / "a.bin")


# Names.


@pytest.mark.parametrize("name", ["x" * 300, "\ud83d.safetensors", "a\0b", "a\nb", "\x1b[2J", "~"])
def test_names_in_an_index(tmp_path: Path, name: str) -> None:
    model = save_tiny("llama", tmp_path / "model", sharded=True, **SMALL)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(PartitionError):
        open_checkpoint(str(model))


def test_names_that_move_the_cursor_are_not_shown(commands: Commands, tmp_path: Path) -> None:
    name = "\x1b[2J\x1b]0;owned\x07" + "x" * 100_000
    path = tmp_path / "a.safetensors"
    metadata = {"format": "privatelora-adapter", "format_version": name}
    save_file({"a": torch.zeros(1)}, path, metadata)
    line = one_line(commands.run(MAIN, "adapter", "inspect", path))
    assert len(line) < 2100


def test_a_file_that_the_manifest_does_not_list(given: Deployment) -> None:
    (given.edge_shard / "tokenizer" / "added_tokens.json").write_text("{}")
    with pytest.raises(PartitionError, match=r"added_tokens\.json is not in the manifest"):
        open_shard(given.edge_shard, "edge")


@pytest.mark.parametrize(
    "place", ["config.max_positions", "config.hidden_size", "config.bos_token_id", "plan.rank_up"]
)
def test_numbers_with_which_arithmetic_overflows(
    commands: Commands, given: Deployment, place: str
) -> None:
    path = given.cloud_shard / "manifest.json"
    manifest = json.loads(path.read_text())
    section, key = place.split(".")
    manifest[section][key] = 10**4000
    path.write_text(json.dumps(manifest))
    one_line(commands.run(SERVE, given.cloud_yaml()))


# Tensors.


def tensor_file(path: Path, header: object, data: bytes = b"", nbytes: int | None = None) -> Path:
    text = json.dumps(header).encode()
    length = len(text) if nbytes is None else nbytes
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def read_all(path: Path) -> None:
    with open_tensor_file(path) as file:
        for name in file.names:
            file.read(name)


@pytest.mark.parametrize(
    ("header", "nbytes"),
    [
        ({"a": entry([2**40, 2**40], 0, 16)}, None),
        ({"a": entry([2**63, 2], 0, 16)}, None),
        ({"a": entry([4], 0, 2**62)}, None),
        ({"a": entry([4], 16, 0)}, None),
        ({"a": entry([-4], 0, 16)}, None),
        ({"a": entry([4], -16, 0)}, None),
        ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, None),
        ({"a": entry([4], 0, 16), "b": entry([2], 8, 16)}, None),
        ({"a": entry([2], 8, 16)}, None),
        ({"a": entry([4], 0, 16, "F31")}, None),
        ({"a": entry([4], 0, 16)}, 2**63),
        ({"a": entry([4], 0, 16)}, 2**64 - 1),
        ({"a": entry([4], 0, 16)}, 10**6),
        ({"a": entry([4], 0, 16)}, 0),
        ({"__metadata__": {"x": "y" * MAX_HEADER_NBYTES}}, None),
    ],
)
def test_headers_of_tensor_files(tmp_path: Path, header: object, nbytes: int | None) -> None:
    path = tensor_file(tmp_path / "a.safetensors", header, bytes(16), nbytes)
    with pytest.raises(PartitionError, match="is damaged"):
        read_all(path)


def test_a_tensor_file_cut_anywhere(given: Deployment) -> None:
    data = given.adapter_file.read_bytes()
    for keep in range(0, len(data), 7):
        given.adapter_file.write_bytes(data[:keep])
        with pytest.raises(PartitionError):
            read_adapter(given.adapter_file)


def test_an_adapter_of_an_enormous_rank(given: Deployment) -> None:
    arrangement = given.plan.arrangement() | {"rank_up": 10**18, "rank_down": 10**18}
    metadata = {
        "format": "privatelora-adapter",
        "format_version": "1",
        "arrangement": json.dumps(arrangement),
        "basis_fingerprint": "0" * 64,
    }
    save_file({"a": torch.zeros(1)}, given.adapter_file, metadata)
    with pytest.raises(PartitionError, match="is missing"):
        read_adapter(given.adapter_file)


def test_a_basis_beyond_float32(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "basis.safetensors"
    with open_checkpoint(str(model)) as checkpoint:
        plan = world().plan.model_copy(
            update={"num_layers": 1, "layers": (0,), "rank_up": 4, "rank_down": 4}
        )
        shapes = basis_shapes(plan, checkpoint.config)
        save_file(
            {name: torch.full(shape, 1e300, dtype=torch.float64) for name, shape in shapes.items()},
            path,
        )
        with pytest.raises(PartitionError, match="other than finite numbers"):
            list(FileBasis(plan, checkpoint.config, path).tensors())


# GGUF.


@pytest.mark.parametrize("counts", [(2**63, 0), (0, 2**63), (40_000, 0), (0, 40_000)])
def test_a_gguf_of_many_entries(counts: tuple[int, int]) -> None:
    with pytest.raises(PartitionError, match="at most 32768 make sense"):
        parse_header(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(2**20), "m.gguf")


def test_a_gguf_of_many_strings() -> None:
    """They would be stepped over one by one, and a sparse file has room for billions."""
    arrays = b"".join(
        string(b"k%d" % i) + struct.pack("<IIQ", 9, 8, 3 * 2**20) + bytes(24 * 2**20)
        for i in range(2)
    )
    with pytest.raises(PartitionError, match="damaged: an array of 3145728 strings"):
        parse_header(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + arrays, "m.gguf")


def test_a_gguf_of_long_strings() -> None:
    keys = b"".join(
        string(b"k%d" % i) + struct.pack("<I", 8) + string(bytes(9 * 2**20)) for i in range(2)
    )
    with pytest.raises(PartitionError, match="a string of 9437184 bytes"):
        parse_header(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + keys, "m.gguf")


def test_a_gguf_whose_tensors_share_their_bytes(tmp_path: Path) -> None:
    """A small file would become large shards."""
    path = write_gguf(tmp_path / "m.gguf", **SMALL)
    data = bytearray(path.read_bytes())
    for name in (b"blk.0.ffn_up.weight", b"blk.0.ffn_gate.weight"):
        place = data.index(name) + len(name) + 4 + 2 * 8 + 4
        data[place : place + 8] = struct.pack("<Q", 0)
    path.write_bytes(data)
    with pytest.raises(PartitionError, match="overlaps another tensor"):
        open_checkpoint(str(path))


# Pickles.


def test_a_compressed_table_of_contents(model: Path, tmp_path: Path) -> None:
    """600 MB of zeros in 600 kB, which torch would unpack."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.bin")
    (model / "model.safetensors").unlink()
    bomb = model / "pytorch_model.bin"
    with zipfile.ZipFile(tmp_path / "a.bin") as source, zipfile.ZipFile(bomb, "w") as archive:
        for item in source.infolist():
            packed = zipfile.ZipInfo(item.filename)
            packed.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(packed, "w") as file:
                for _ in range(64):
                    file.write(bytes(2**20))
    for read in (lambda: open_checkpoint(str(model)), lambda: read_published(bomb)):
        with pytest.raises(PartitionError, match="which torch never writes"):
            read()


def test_a_long_table_of_contents(tmp_path: Path) -> None:
    """Lists in lists, which take fifty times their text."""
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"(" * 3_000_000 + b".")
    with pytest.raises(PartitionError, match="a table of contents of 3000003 bytes"):
        read_published(path)


@pytest.mark.parametrize("kind", ["strided", "sparse", "meta"])
def test_tensors_that_are_larger_than_their_bytes(tmp_path: Path, kind: str) -> None:
    if kind == "strided":
        tensor = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))
    elif kind == "sparse":
        tensor = torch.eye(4).to_sparse()
    else:
        tensor = torch.empty(10**6, 10**6, device="meta")
    parts = ("lora_A", "lora_mobile", "lora_B")
    state = {f"model.layers.0.self_attn.q_lora.{part}.weight": tensor for part in parts}
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(PartitionError, match="is not a matrix of numbers"):
        read_published(tmp_path / "a.bin")


# YAML.

BOMBS = {
    "aliases": "a: &a [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1 or ''}]\n" for i in range(1, 9)),
    "merges": "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nrank_up: {<<: [*b, *b]}",
    "itself": "rank_up: &a [*a]",
    "many values": f"layers: [{'0,' * MAX_NODES}]",
    "lists in lists": "layers: " + "[" * 100_000,
    "a long number": "rank_up: 0x" + "f" * 100_000,
    "a number in base 60": "rank_up: 1" + ":59" * 100_000,
    "many keys": "\n".join(f"rank_u{i}: 1" for i in range(16_000)),
    "a key twice": "rank_up: 8\nrank_up: 9",
    "a tag that runs code": "rank_up: !!python/object/apply:os.getpid []",
    "a tag that makes a name": "rank_up: !!python/name:os.system",
    "too long": "#" * (2**20 + 1),
    "many layers": "num_layers: 1000000000",
    "a far layer": "layers: 0-999999999",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml(commands: Commands, tmp_path: Path, bomb: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(BOMBS[bomb])
    result = commands.run(MAIN, "config", "check", path)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert len(result.out + result.err) < 3000
    if bomb != "a far layer":  # which only the model tells
        with pytest.raises(ConfigError, match=r"plan\.yaml"):
            read_plan_file(path)


# JSON.


def test_a_manifest_of_very_many_values(given: Deployment) -> None:
    """Python would take thirty times its size, and as much again to say what is wrong with it."""
    path = given.cloud_shard / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["plan"]["layers"] = [[]] * 1_000_000
    path.write_text(json.dumps(manifest, separators=(",", ":")))
    with pytest.raises(PartitionError, match="more than 262144 values"):
        open_shard(given.cloud_shard, "cloud")
    manifest["plan"]["layers"] = [[]] * 200_000
    path.write_text(json.dumps(manifest, separators=(",", ":")))
    with pytest.raises(PartitionError, match="200000 of its values are not what they should be"):
        open_shard(given.cloud_shard, "cloud")


# Tokenizers and chat templates: programs, which may take time and memory, and reach nothing else.


def tokenizer_folder(path: Path, template: str | None = None, **changes: Any) -> Path:
    tiny_tokenizer().save_pretrained(path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    file = path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch TRAP') }}",
        "{% include '/etc/passwd' %}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_reaches_nothing(tmp_path: Path, template: str) -> None:
    trap = tmp_path / "trap"
    folder = tokenizer_folder(tmp_path / "tokenizer", template.replace("TRAP", str(trap)))
    text = TextModel(world().unsplit(), load_tokenizer(folder))
    with pytest.raises(RequestError, match="chat template refuses"):
        text.encode_chat([{"role": "user", "content": "Hello"}])
    assert not trap.exists()


def test_code_beside_a_tokenizer_is_not_run(model: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (model / "evil.py").write_text(f"open({str(trap)!r}, 'w')\n")
    config = model / "tokenizer_config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text())
            | {"auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]}, "tokenizer_class": "E"}
        )
    )
    with open_checkpoint(str(model)) as checkpoint, suppress(PartitionError):
        export_tokenizer(checkpoint, tmp_path / "out")
    assert not trap.exists()


def test_an_expression_without_an_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library gives up after a while, and panics; that must not end the edge."""
    slow = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    folder = tokenizer_folder(tmp_path / "tokenizer", pre_tokenizer=slow)
    text = TextModel(world().unsplit(), load_tokenizer(folder))
    with pytest.raises(RequestError, match="cannot take this text apart"):
        text.encode_prompt("a" * 40 + "!")
    capfd.readouterr()  # the library prints where it panicked
    assert text.encode_prompt("b")


def test_a_vast_tokenizer(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer")
    os.truncate(folder / "tokenizer.json", 200 << 20)
    with pytest.raises(PartitionError, match="no part of a tokenizer"):
        load_tokenizer(folder)


# Many more, made by chance.


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command limits its process, which here is that of all tests."""
    monkeypatch.setattr("tests.security.files.resource.setrlimit", lambda *_: None)


@pytest.mark.usefixtures("unlimited")
def test_a_short_campaign(capfd: pytest.CaptureFixture[str]) -> None:
    status = files.main(["--inputs", "1500", "--seed", "1"])
    shown = capfd.readouterr().out
    assert status == 0, shown
    assert "1500 inputs in" in shown
    for kind in ("Manifest", "AdapterFile", "Gguf", "HfConfig", "TokenizerFile"):
        assert kind in shown


@pytest.mark.usefixtures("unlimited")
def test_a_campaign_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.security.kinds.Manifest.read", fail_after_first())
    assert files.main(["--inputs", "20", "--seed", "1"]) == 1
    shown = capsys.readouterr().out
    assert "IndexError: a defect" in shown
    assert "again: python -m tests.security.files --seed 1 --start 1 --inputs 1" in shown


def fail_after_first() -> Callable[[object], None]:
    """Good files are read first."""
    calls: list[object] = []

    def read(kind: object) -> None:
        calls.append(kind)
        if len(calls) > 1:
            raise IndexError("a defect")

    return read
