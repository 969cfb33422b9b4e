"""What a sweep measures, in which order, and what the baselines send."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from privatelora.benchmarks.predict_hardware import Link
from privatelora.benchmarks.replay import (
    ReplayRequest,
    Traffic,
    pickled_nbytes,
    replay,
    serve_replay,
    traffic,
)
from privatelora.benchmarks.sweep_config import SweepConfig, cases, read_sweep_config
from privatelora.benchmarks.sweep_show import panels_of
from privatelora.errors import ConfigError
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.runtime.unsplit import open_unsplit
from privatelora.transports.base import Connection
from privatelora.transports.registry import connect, listen
from tests.partition.tiny import save_tiny

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL: dict[str, Any] = {
    "out": "sweep",
    "links": {"near": "1ms", "far": "80ms,60/100mbps"},
    "arrangements": {"per layer": {}, "grouped": {"every": 2}},
    "payloads": {"fp16": "fp16", "default": {}},
    "sessions": [1, 4],
    "baselines": ["transformers", "text"],
}


def config(tmp_path: Path, **changes: Any) -> SweepConfig:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return read_sweep_config(file)


def test_everything_is_measured_with_everything(tmp_path: Path) -> None:
    found = cases(config(tmp_path))
    ours = [case for case in found if not case.baseline]
    assert len({*map(str, found)}) == len(found) == 2 * 2 * 2 * 2 + 2 + 1
    assert {case.sessions for case in ours} == {1, 4}
    # What no link changes is measured once; the others stand beside what they are compared with.
    assert [case.baseline for case in found if not case.link] == ["transformers"]
    links = [case.link for case in found if case.link]
    assert links == sorted(links, reverse=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"links": {"far": "soon"}}, "link 'soon'"),
        ({"links": {}}, "links"),
        ({"baselines": ["petals"]}, "baselines"),
        ({"tokens": 3}, "tokens"),
        ({"payloads": {"small": "int3.5"}}, "no payload codec 'int3.5'"),
        ({"arrangement": {}}, "arrangement"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config(tmp_path, **changes)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("sweep-*.yaml")), ids=lambda file: file.stem)
def test_ready_files_are_right(file: Path) -> None:
    ready = read_sweep_config(file)
    is_short = file.stem in ("sweep-quick", "sweep-gpu")
    assert len(cases(ready)) > len(ready.links) >= (3 if is_short else 9)


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("sweep-links.yaml", ["rtt_ms", "up_mbps"]),
        ("sweep-networks.yaml", ["name"]),
        ("sweep-gpu.yaml", ["name"]),
    ],
)
def test_a_plot_has_every_link(file: str, keys: list[str]) -> None:
    links = read_sweep_config(CONFIGS / file).parsed_links()
    found = panels_of({name: link.as_json() for name, link in links.items()})
    assert [key for _, key, _ in found] == keys
    assert {name for *_, places in found for name in places} == links.keys()


def test_what_other_ways_send(tmp_path: Path) -> None:
    with open_checkpoint(str(save_tiny("llama", tmp_path / "model"))) as checkpoint:
        shape = checkpoint.config
    hidden, layers = shape.hidden_size, shape.num_layers
    updates = sum(shape.projection_size(target) for target in "qkv")
    full, two = traffic("hidden-states", shape), traffic("lora-two-layers", shape)
    assert full.nbytes == 2 * (2 * hidden + layers * (hidden + updates))
    assert (full.round_trips, two.round_trips) == (1 + layers, 1 + min(2, layers))
    published = traffic("published", shape)
    assert published.exchange_up == published.exchange_down == pickled_nbytes(3 * 128)
    assert 4 * 3 * 128 < pickled_nbytes(3 * 128) < 4 * 3 * 128 + 256
    assert traffic("text", shape).round_trips == 0


def test_a_token_takes_its_round_trips_and_its_bytes() -> None:
    sent = Traffic(up=1000, exchange_down=500, exchange_up=250, exchanges=4, down=3000)
    link = Link(0.02, 1e6, 2e6)
    assert sent.seconds(0.1, link) == pytest.approx(
        0.1 + 5 * 0.02 + 8 * (1000 + 4 * 250) / 1e6 + 8 * (3000 + 4 * 500) / 2e6
    )
    streamed = Traffic(exchange_down=0, exchange_up=0, exchanges=0, down=16)
    assert streamed.seconds(0.1, link) == 0.1


@pytest.mark.parametrize("streams", [False, True])
async def test_a_replay_sends_what_it_says(tmp_path: Path, streams: bool) -> None:
    model = open_unsplit(str(save_tiny("llama", tmp_path / "model"))).model
    sent = Traffic(
        up=None if streams else 100, exchange_down=50, exchange_up=25, exchanges=3, down=30
    )
    ended = asyncio.Event()

    async def handle(connection: Connection) -> None:
        with contextlib.closing(_Ending(ended)):
            await serve_replay(connection, model)

    async with await listen("inproc://test-replay", handle):
        connection = await connect("inproc://test-replay")
        async with connection:
            before = connection.counters.received_frames
            request = ReplayRequest(traffic=sent, prompt_tokens=4, tokens=5)
            moments = await replay(connection, request)
            assert moments == sorted(moments)
            assert len(moments) == 5
            assert connection.counters.received_frames - before == 5 * (3 + 1)
            assert connection.counters.sent_frames == 1 + 5 * (3 + (not streams))
        await asyncio.wait_for(ended.wait(), 10)


class _Ending:
    def __init__(self, ended: asyncio.Event) -> None:
        self._ended = ended

    def close(self) -> None:
        self._ended.set()
