"""The YAML files: what is in them, and what is said of those that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from privatelora.benchmarks.sweep_config import read_sweep_config
from privatelora.errors import ConfigError
from privatelora.partition.plan_file import read_plan_file
from privatelora.runtime.codecs import CodecPreferences
from privatelora.runtime.config import (
    CloudConfig,
    EdgeConfig,
    load_cloud_config,
    load_edge_config,
)
from privatelora.runtime.host_port import parse_host_port
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.training.config import read_train_config
from privatelora.transports.base import (
    NO_CREDENTIALS,
    Credentials,
    CurveCredentials,
    TlsCredentials,
)
from privatelora.yaml_file import MAX_FILE_NBYTES, explain, read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
LOADERS: dict[str, Callable[[Path], Any]] = {
    "cloud": load_cloud_config,
    "edge": load_edge_config,
    "plan": read_plan_file,
    "train": read_train_config,
    "sweep": read_sweep_config,
}
CLOUD = "listen: tcp://127.0.0.1:0\nshard: shards/cloud\n"
DEFAULT_CODECS = CodecPreferences(
    hidden_states_up=("int8", "fp16"),
    exchange_up=("int6", "fp16"),
    hidden_states_down=("int12", "fp16"),
    exchange_down=("int6", "fp16"),
)
EDGE = "cloud: tcp://127.0.0.1:1\nshard: shards/edge\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


Write = Callable[[str | bytes], Path]


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_every_file_in_configs_loads(path: Path) -> None:
    kind = path.name.partition("-")[0]
    settings = LOADERS[kind](path)
    if kind in ("train", "sweep"):
        assert settings.out == CONFIGS / ".." / "out" / path.stem
    elif kind != "plan":
        assert settings.shard == CONFIGS / ".." / "out/shards" / kind


def test_cloud_defaults(write: Write) -> None:
    config = load_cloud_config(write(CLOUD))
    assert (config.device, config.dtype, config.num_threads, config.spin_us) == (
        "cpu",
        "auto",
        None,
        None,
    )


def test_edge_defaults(write: Write) -> None:
    config = load_edge_config(write(EDGE))
    assert config.adapter is None
    assert config.payload.preferences() == DEFAULT_CODECS
    assert config.credentials() == NO_CREDENTIALS
    assert config.sampling == SamplingParams()
    assert config.system_prompt is None


def test_what_is_written_is_what_is_read(write: Write) -> None:
    config = load_edge_config(
        write(
            EDGE
            + "adapter: mine.safetensors\nstep_timeout_s: 2.5\n"
            + "sampling:\n  temperature: 0.7\n  stop: [END, '\\n\\n']\n"
        )
    )
    assert config.step_timeout_s == 2.5
    assert config.sampling == SamplingParams(temperature=0.7, stop=("END", "\\n\\n"))


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ("fp32", [("fp32",)] * 4),
        ("{up: bf16}", [("bf16",), ("bf16",), ("int12", "fp16"), ("int6", "fp16")]),
        (
            "{up: {exchange: bf16}}",
            [("int8", "fp16"), ("bf16",), ("int12", "fp16"), ("int6", "fp16")],
        ),
        (
            "{up: fp32, down: {hidden_states: [bf16, fp32]}}",
            [("fp32",), ("fp32",), ("bf16", "fp32"), ("int6", "fp16")],
        ),
    ],
)
def test_payload_codecs(write: Write, payload: str, expected: list[tuple[str, ...]]) -> None:
    config = load_edge_config(write(EDGE + f"payload: {payload}\n"))
    assert config.payload.preferences() == CodecPreferences(*expected)


def test_keys_are_files_beside_the_file(write: Write, tmp_path: Path) -> None:
    config = load_cloud_config(
        write(CLOUD + "tls: {certificate: a.crt, key: a.key}\ncurve: {key: /b.key, trust: in}\n")
    )
    assert config.credentials() == Credentials(
        tls=TlsCredentials(tmp_path / "a.crt", tmp_path / "a.key", None),
        curve=CurveCredentials(Path("/b.key"), tmp_path / "in"),
    )


def test_metrics_and_trace_are_off_unless_asked_for(write: Write, tmp_path: Path) -> None:
    config = load_cloud_config(write(CLOUD))
    assert (config.metrics, config.trace) == (None, None)
    config = load_cloud_config(write(CLOUD + "metrics: 127.0.0.1:9464\ntrace: trace.json\n"))
    assert config.metrics == "127.0.0.1:9464"
    assert config.trace == tmp_path / "trace.json"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost:0", ("localhost", 0)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::1]:9464", ("::1", 9464)),
    ],
)
def test_metrics_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_host_port(text) == expected


def test_relative_paths_are_beside_the_file(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(EDGE + "adapter: ../mine.safetensors\n")
    config = load_edge_config(path)
    assert config.shard == tmp_path / "shards/edge"
    assert config.adapter == tmp_path / "../mine.safetensors"
    monkeypatch.chdir(tmp_path)
    assert load_edge_config(Path(path.name)).shard == tmp_path / "shards/edge"


def test_other_paths_stay(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_edge_config(
        write("cloud: tcp://a:1\nshard: /shards/edge\nadapter: ~/mine.safetensors\n")
    )
    assert config.shard == Path("/shards/edge")
    assert config.adapter == Path("/home/somebody/mine.safetensors")
    without_file = CloudConfig(listen="tcp://127.0.0.1:1", shard=Path("x"))
    assert without_file.shard == Path("x")


@pytest.mark.parametrize(
    ("load", "text", "said"),
    [
        (
            load_cloud_config,
            CLOUD + "max_sesions: 4\n",
            ["'max_sesions'", "did you mean max_sessions"],
        ),
        (load_cloud_config, "listn: tcp://a:1\nshard: x\n", ["'listn'", "did you mean listen"]),
        (load_cloud_config, CLOUD + "zzz: 4\n", ["'zzz'", "known keys: listen, shard"]),
        (
            load_edge_config,
            EDGE + "payload: {up: {exchnge: fp16}}\n",
            ["'payload.up.exchnge'", "did you mean exchange"],
        ),
        (
            load_edge_config,
            EDGE + "sampling: {max_token: 1}\n",
            ["'sampling.max_token'", "did you mean max_tokens"],
        ),
        (read_plan_file, "rank_upp: 8\n", ["'rank_upp'", "did you mean rank_up"]),
    ],
)
def test_unknown_keys(write: Write, load: Any, text: str, said: list[str]) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    for words in (str(path), "unknown key", *said):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("load", "text", "said"),
    [
        (load_cloud_config, CLOUD + "max_sessions: many\n", "max_sessions: "),
        (load_cloud_config, CLOUD + "max_sessions: 0\n", "max_sessions: "),
        (load_cloud_config, CLOUD + "num_threads: 1.5\n", "num_threads: "),
        (load_cloud_config, CLOUD + "device: gpu\n", "device: "),
        (load_cloud_config, CLOUD + "dtype: int8\n", "dtype: "),
        (load_cloud_config, CLOUD + "spin_us: 1000000\n", "spin_us: "),
        (load_cloud_config, CLOUD + "metrics: 9464\n", "metrics: "),
        (load_cloud_config, CLOUD + "metrics: '9464'\n", "metrics: expected host:port, such as"),
        (load_cloud_config, CLOUD + "metrics: a:99999\n", "metrics: expected host:port, such as"),
        (load_cloud_config, CLOUD + "metrics: http://a:1\n", "metrics: expected host:port"),
        (load_cloud_config, CLOUD + "metrics: a:1/metrics\n", "metrics: expected host:port"),
        (load_cloud_config, CLOUD + "metrics: '*:9464'\n", "metrics: for all interfaces set 0.0"),
        (load_cloud_config, CLOUD + "trace: [x]\n", "trace: "),
        (load_cloud_config, "shard: x\n", "listen: Field required"),
        (load_cloud_config, "", "listen: Field required"),
        (load_cloud_config, "listen: 5\nshard: x\n", "listen: "),
        (load_cloud_config, "listen: a\nshard: [x]\n", "shard: "),
        (load_cloud_config, CLOUD + "1: 2\n", "1"),
        (load_edge_config, EDGE + "payload: int3\n", "payload: no payload codec 'int3'"),
        (load_edge_config, EDGE + "payload: {up: {exchange: []}}\n", "payload.up.exchange: "),
        (load_edge_config, EDGE + "payload: 16\n", "payload: "),
        (load_edge_config, EDGE + "curve: {key: a}\n", "curve.trust: Field required"),
        (load_edge_config, EDGE + "sampling: {top_p: 2}\n", "sampling.top_p: "),
        (load_edge_config, EDGE + "sampling: {stop: word}\n", "sampling.stop: "),
        (load_edge_config, EDGE + "sampling: {temperature: .nan}\n", "sampling.temperature: "),
        (load_edge_config, EDGE + "sampling: {temperature: .inf}\n", "sampling.temperature: "),
        (load_edge_config, EDGE + "step_timeout_s: .nan\n", "step_timeout_s: "),
        (load_edge_config, EDGE + "step_timeout_s: -1\n", "step_timeout_s: "),
    ],
)
def test_wrong_values(write: Write, load: Any, text: str, said: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {said}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- listen\n- shard\n", "expected keys and values, such as 'listen: ...'"),
        ("just words\n", "expected keys and values"),
        ("5\n", "expected keys and values"),
        ("listen: [\n", "not valid YAML"),
        ("shard: x\nlisten: 'open\n", "not valid YAML"),
        ("a: b: c\n", ", line 1: not valid YAML"),
        ("listen: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("listen: 2026-99-99\n", "not valid YAML"),
        ("spin_us: !!int many\n", "not valid YAML"),
        (f"spin_us: {'9' * 5000}\n", "not valid YAML"),
        ("listen: " + "[" * 5000, "not valid YAML"),
        (b"listen: \xff\xfe\n", "not valid YAML"),
        ("#" * (MAX_FILE_NBYTES + 1), "larger than"),
    ],
)
def test_files_that_are_no_settings(write: Write, content: str | bytes, said: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load_cloud_config(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.yaml: No such file"):
        load_cloud_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_cloud_config(tmp_path)


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: str


class _Nested(BaseModel):
    model_config = ConfigDict(extra="forbid")
    turns: list[_Turn] | None = None
    by_name: dict[str, _Turn] | None = None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"turns": [{"role": "x", "rle": 1}]}, "unknown key 'turns.0.rle'; did you mean role?"),
        (
            {"by_name": {"x": {"role": "x", "zz": 1}}},
            "unknown key 'by_name.x.zz'; known keys: role",
        ),
        ({"turns": [{}]}, "turns.0.role: Field required"),
        ({"turn": []}, "unknown key 'turn'; did you mean turns?"),
    ],
)
def test_keys_inside_lists_are_explained_too(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _Nested.model_validate(values)
    assert explain(caught.value, _Nested) == said


def test_an_empty_file_is_all_defaults(write: Write) -> None:
    assert read_yaml(write("# nothing\n"), SamplingParams) == SamplingParams()


def test_settings_do_not_change() -> None:
    config = EdgeConfig(cloud="tcp://a:1", shard=Path("x"))
    with pytest.raises(ValidationError):
        config.cloud = "tcp://b:1"


GUARDED = [
    "listen: tls://0.0.0.0:1\ntls: {certificate: a, key: b, trust: c}\n",
    "listen: tls://0.0.0.0:1\ntls: {certificate: a, key: b}\ntokens: t\n",
    "listen: zmq+tcp://*:1\ncurve: {key: a, trust: b}\n",
    "listen: tcp://0.0.0.0:1\nopen_to_all: true\n",
    "listen: tcp://[::1]:1\n",
    "listen: zmq+tcp://localhost:1\n",
    "listen: shm://here\n",
]
OPEN = [
    "listen: tcp://0.0.0.0:1\n",
    "listen: tcp://192.0.2.7:1\n",
    "listen: tcp://cloud.example:1\ntokens: t\n",  # which no edge sends there
    "listen: tls://*:1\ntls: {certificate: a, key: b}\n",
    "listen: zmq+tcp://[::]:1\n",
    "listen: zmq+tcp://*:1\ntokens: t\n",
]


@pytest.mark.parametrize("text", GUARDED)
def test_a_cloud_that_knows_who_comes_may_listen(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cloud.yaml"
    path.write_text(f"shard: x\n{text}")
    load_cloud_config(path)


@pytest.mark.parametrize("text", OPEN)
def test_a_cloud_does_not_let_in_everybody_unasked(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cloud.yaml"
    path.write_text(f"shard: x\n{text}")
    with pytest.raises(ConfigError, match=r"listen: everybody who can reach .* would be let in"):
        load_cloud_config(path)
