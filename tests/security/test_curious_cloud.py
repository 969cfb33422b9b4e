"""What a cloud learns that keeps what it is sent, and who reads along.

These tests do not show that something is safe. They hold fast what is not: each is an attack, and
most succeed. Whoever makes one fail has improved the design, and changes SECURITY.md with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from privatelora.runtime.config import EdgeConfig
from privatelora.runtime.tensors import unpack
from privatelora.runtime.wire.codec import decode
from privatelora.runtime.wire.messages import Hello
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.transports.tls_keys import new_certificate
from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import SERVE, Process
from tests.partition.tiny import tiny_model
from tests.security.attacks import (
    PublicLayers,
    fraction_equal,
    nearest,
    next_tokens,
    relative_error,
    solve_all,
)
from tests.security.recording import (
    CODECS,
    RecordingCloud,
    Seen,
    cut_frames,
    generate,
    look,
)
from tests.transports.relay import Relay

NUM_TOKENS = 24
PROMPTS = [[1, *range(10, 50)], [1, *range(60, 120, 2)]]
RANK_UP = 8


@dataclass
class Recorded:
    """A generation, what the cloud kept of it, and the public model."""

    deployment: Deployment
    seen: Seen
    answers: list[int]
    model: Any

    @property
    def inputs(self) -> list[int]:
        """Every token that was fed to the model: all but the last of each answer."""
        fed: list[int] = []
        for number, prompt in enumerate(PROMPTS):
            fed += prompt + self.answers[number * NUM_TOKENS : (number + 1) * NUM_TOKENS][:-1]
        return fed

    @property
    def final(self) -> torch.Tensor:
        """Of what steps ended with, the rows that tokens were chosen from."""
        rows = self.seen.final
        if len(rows) == len(self.answers):
            return rows
        ends = torch.tensor([len(prompt) + NUM_TOKENS - 1 for prompt in PROMPTS]).cumsum(0)
        return torch.cat([rows[end - NUM_TOKENS : end] for end in ends.tolist()])

    @property
    def embeddings(self) -> torch.Tensor:
        weight: torch.Tensor = self.model.model.embed_tokens.weight.detach()
        return weight


async def record(directory: Path, codecs: str, **options: Any) -> Recorded:
    deployment, _ = tiny_deployment("llama", directory, rank_up=RANK_UP, rank_down=6, **options)
    cloud = RecordingCloud(deployment.cloud_shard)
    async with cloud.serving(directory.name) as address:
        config = edge_config(deployment, address, payload=CODECS[codecs])
        answers = await generate(config, PROMPTS, NUM_TOKENS)
    return Recorded(deployment, look(cloud.frames), answers, tiny_model("llama"))


def edge_config(deployment: Deployment, address: str, **settings: Any) -> EdgeConfig:
    return EdgeConfig(
        cloud=address,
        shard=deployment.edge_shard,
        adapter=deployment.adapter_file,
        **settings,
    )


@pytest.mark.parametrize("codecs", CODECS)
async def test_every_token_is_found_among_the_embeddings(tmp_path: Path, codecs: str) -> None:
    recorded = await record(tmp_path, codecs)
    found = nearest(recorded.seen.hidden_states, recorded.embeddings)
    assert found.tolist() == recorded.inputs


@pytest.mark.parametrize("codecs", CODECS)
async def test_the_next_token_is_read_off_the_final_hidden_states(
    tmp_path: Path, codecs: str
) -> None:
    recorded = await record(tmp_path, codecs)
    assert next_tokens(recorded.model, recorded.final).tolist() == recorded.answers


@pytest.mark.parametrize("every", [1, 2])
async def test_m_is_solved_from_as_many_pairs_as_it_has_columns(tmp_path: Path, every: int) -> None:
    recorded = await record(tmp_path, "fp32", every=every)
    plan, true = recorded.deployment.plan, recorded.deployment.adapter.weights

    def error(num_pairs: int) -> float:
        return relative_error(solve_all(recorded.seen.exchanges, plan, num_pairs), true)

    assert error(RANK_UP // 2) > 0.5  # too few equations
    assert error(RANK_UP) < 1e-2
    assert error(4 * RANK_UP) < 1e-4


async def test_rounding_blurs_m_and_more_pairs_sharpen_it(tmp_path: Path) -> None:
    recorded = await record(tmp_path, "default")
    plan, true = recorded.deployment.plan, recorded.deployment.adapter.weights
    few, many = (
        relative_error(solve_all(recorded.seen.exchanges, plan, n), true)
        for n in (2 * RANK_UP, 10 * RANK_UP)
    )
    assert many < few
    assert many < 0.1


@pytest.mark.parametrize("edge_first", [1, 2])
async def test_layers_on_the_edge_end_the_lookup_and_not_the_attack(
    tmp_path: Path, edge_first: int
) -> None:
    recorded = await record(tmp_path, "default", edge_first=edge_first)
    rows, true = recorded.seen.hidden_states, recorded.inputs
    looked_up = fraction_equal(nearest(rows, recorded.embeddings), true)
    assert looked_up < 0.5

    layers = PublicLayers(recorded.model, edge_first)
    table = layers.dictionary(len(recorded.embeddings), PROMPTS[0][0])
    assert fraction_equal(nearest(rows, table), true) < 0.5  # it knows nothing of the context
    num_first = len(PROMPTS[0]) + NUM_TOKENS - 1
    followed = layers.follow(rows[:num_first], table, len(table))
    assert followed.tolist() == true[:num_first]


async def test_last_layers_on_the_edge_end_the_exact_reading_only(tmp_path: Path) -> None:
    recorded = await record(tmp_path, "default", edge_last=1)
    found = next_tokens(recorded.model, recorded.final)
    assert fraction_equal(found, recorded.answers) < 1.0


# Who reads along between the two.


async def test_on_tcp_who_reads_along_sees_what_the_cloud_sees(tmp_path: Path) -> None:
    deployment, _ = tiny_deployment("llama", tmp_path, rank_up=RANK_UP, rank_down=6)
    token = tmp_path / "alice.token"
    token.write_text("T" * 43)
    with Process(SERVE, deployment.cloud_yaml()) as cloud:
        with Relay(port_of(cloud.read_ready())) as relay:
            config = edge_config(deployment, f"tcp://127.0.0.1:{relay.port}", token={"file": token})
            answers = await generate(config, PROMPTS[:1], NUM_TOKENS)
        cloud.terminate()
        assert cloud.wait() == 0
    frames = cut_frames(bytes(relay.up))
    hello = decode(memoryview(frames[0]), WireLimits())
    assert isinstance(hello, Hello)
    assert hello.token == "T" * 43  # within this machine it may be sent like this, never beyond
    from_edge = [frame for frame in frames if is_step_begin(frame)]
    hidden_states = torch.cat([look_at_begin(frame) for frame in from_edge])
    embeddings = tiny_model("llama").model.embed_tokens.weight.detach()
    assert nearest(hidden_states, embeddings).tolist() == PROMPTS[0] + answers[:-1]


async def test_on_tls_who_reads_along_sees_lengths(tmp_path: Path) -> None:
    """And times. Lengths tell how long a prompt is, and how many tokens an answer has."""
    deployment, _ = tiny_deployment("llama", tmp_path, rank_up=RANK_UP, rank_down=6)
    key, certificate = tmp_path / "cloud.key", tmp_path / "cloud.crt"
    new_certificate(key, certificate, "cloud", ("127.0.0.1",), days=1)
    token = tmp_path / "alice.token"
    token.write_text("T" * 43)
    settings: dict[str, Any] = {
        "listen": "tls://127.0.0.1:0",
        "tls": {"certificate": str(certificate), "key": str(key)},
    }
    sent: list[bytes] = []
    with Process(SERVE, deployment.cloud_yaml(**settings)) as cloud:
        port = port_of(cloud.read_ready())
        for num_positions in (16, 48, 80):
            with Relay(port) as relay:
                config = edge_config(
                    deployment,
                    f"tls://127.0.0.1:{relay.port}",
                    token={"file": token},
                    tls={"trust": certificate},
                    prefill_chunk=128,
                    payload=CODECS["fp32"],
                )
                await generate(config, [[1, *range(20, 19 + num_positions)]], 1)
            sent.append(bytes(relay.up))
            for stream in (relay.up, relay.down):
                assert b"T" * 43 not in stream
                assert b"privatelora/" not in stream  # in every Hello
        cloud.terminate()
        assert cloud.wait() == 0
    embedding = tiny_model("llama").model.embed_tokens.weight.detach()
    assert all(bytes(embedding[1].numpy().data) not in stream for stream in sent)
    first, second, third = (sum(application_records(stream)) for stream in sent)
    per_position = (second - first) / 32
    assert abs((third - second) / per_position - 32) < 0.5


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def is_step_begin(frame: bytes) -> bool:
    return type(decode(memoryview(frame), WireLimits())).__name__ == "StepBegin"


def look_at_begin(frame: bytes) -> torch.Tensor:
    message: Any = decode(memoryview(frame), WireLimits())
    return unpack(message.hidden_states, torch.device("cpu"), torch.float32)


def application_records(stream: bytes) -> list[int]:
    """Lengths of the TLS records with data, which are sent in the clear (RFC 8446, 5.1)."""
    lengths, place = [], 0
    while place < len(stream):
        kind, nbytes = stream[place], int.from_bytes(stream[place + 3 : place + 5])
        if kind == 23:
            lengths.append(nbytes)
        place += 5 + nbytes
    return lengths
