"""The same answers over every transport and in every payload codec, in process and as daemons."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch

from privatelora.runtime.cloud import Cloud
from privatelora.runtime.config import CloudConfig, EdgeConfig
from privatelora.runtime.edge import Edge
from privatelora.runtime.link_config import CurveConfig, PayloadConfig, TlsConfig
from privatelora.runtime.payload.names import CODEC_NAMES
from privatelora.transports.base import Credentials
from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import EDGE, SERVE, Process
from tests.e2e.test_equality import NUM_TOKENS, PROMPT, follow
from tests.transports import third_party
from tests.transports.cases import CASES, Case

TOLERANCE = {
    "fp32": 0.0,
    "fp16": 0.004,
    "bf16": 0.03,
    "int12": 0.006,
    "int10": 0.02,
    "int8": 0.1,
    "fp8": 0.4,
    "int6": 0.3,
    "int4": 0.9,
    "default": 0.1,
}
"""Root mean square error of the logits that is allowed, relative to their own root mean square:
about twice what a tiny random model shows, which amplifies errors more than a trained one. Its
margins are narrow and its tokens may differ, so codecs are compared along those of fp32."""

NUM_TOKENS_OF_EACH = 8
"""Of every codec over every transport, which are many; of each of them there are more elsewhere."""

REAL_CASES = [case for case in CASES if case.wrap is None]
_numbers = itertools.count()


class Answer(NamedTuple):
    tokens: list[int]
    logits: torch.Tensor


def payload(codec: str) -> PayloadConfig:
    return PayloadConfig() if codec == "default" else PayloadConfig.model_validate(codec)


def security(credentials: Credentials) -> dict[str, Any]:
    """Settings that make the daemons use ``credentials``."""
    settings: dict[str, Any] = {}
    if (tls := credentials.tls) is not None:
        settings["tls"] = TlsConfig(
            certificate=tls.certificate, key=tls.private_key, trust=tls.trust
        )
    if (curve := credentials.curve) is not None:
        settings["curve"] = CurveConfig(key=curve.secret_key, trust=curve.trust)
    return settings


async def answer(case: Case, deployment: Deployment, codec: str, tokens: list[int]) -> Answer:
    """What an edge says after ``PROMPT``; the logits along ``tokens`` if there are any."""
    keyring = case.keyring()
    cloud = Cloud(
        CloudConfig(
            listen=case.listen_address(),
            shard=deployment.cloud_shard,
            **security(keyring.listener),
        )
    )
    async with await cloud.listen() as listener:
        edge = Edge(
            EdgeConfig(
                cloud=listener.address,
                shard=deployment.edge_shard,
                adapter=deployment.adapter_file,
                payload=payload(codec),
                **security(keyring.client),
            )
        )
        try:
            if not tokens:
                return Answer(*await follow(edge.model, NUM_TOKENS))
            return Answer(tokens, await along(edge, tokens))
        finally:
            await edge.aclose()


async def along(edge: Edge, tokens: list[int]) -> torch.Tensor:
    """Logits of the prompt and after each of ``tokens`` but the last, decoded one by one."""
    sequence = await edge.model.open_sequence(len(PROMPT) + len(tokens))
    try:
        logits = [await sequence.forward(PROMPT, 0, "all")]
        for position, token in enumerate(tokens[:-1], start=len(PROMPT)):
            logits.append(await sequence.forward([token], position, "last"))
    finally:
        await sequence.aclose()
    return torch.cat(logits)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    directory = tmp_path_factory.mktemp("transports")
    return tiny_deployment("llama", directory, rank_up=8, rank_down=8)[0]


class References:
    """Answers over ``inproc``, by codec."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._inproc = next(case for case in CASES if case.scheme == "inproc")
        self._known: dict[str, Answer] = {}

    async def get(self, codec: str) -> Answer:
        if codec not in self._known:
            tokens = (await self.greedy()).tokens
            self._known[codec] = await answer(self._inproc, self._deployment, codec, tokens)
        return self._known[codec]

    async def greedy(self) -> Answer:
        """What fp32 says by itself."""
        if "" not in self._known:
            self._known[""] = await answer(self._inproc, self._deployment, "fp32", [])
        return self._known[""]


@pytest.fixture(scope="module")
def references(deployment: Deployment) -> References:
    return References(deployment)


@pytest.mark.parametrize("case", REAL_CASES, ids=lambda case: case.name)
async def test_generation_is_that_of_inproc(
    case: Case, deployment: Deployment, references: References
) -> None:
    expected = await references.greedy()
    found = await answer(case, deployment, "fp32", [])
    assert found.tokens == expected.tokens
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("codec", ["default", *CODEC_NAMES])
async def test_codecs_are_within_their_tolerance(codec: str, references: References) -> None:
    exact, found = await references.get("fp32"), await references.get(codec)
    error = (found.logits - exact.logits).pow(2).mean().sqrt() / exact.logits.pow(2).mean().sqrt()
    plain = codec.removesuffix("+lz4")
    assert error <= TOLERANCE[plain]
    if plain != codec:
        assert torch.equal(found.logits, (await references.get(plain)).logits)


@pytest.mark.parametrize("codec", ["default", *CODEC_NAMES])
@pytest.mark.parametrize("case", REAL_CASES, ids=lambda case: case.name)
async def test_every_codec_over_every_transport(
    case: Case, codec: str, deployment: Deployment, references: References
) -> None:
    expected = await references.get(codec)
    found = await answer(case, deployment, codec, expected.tokens[:NUM_TOKENS_OF_EACH])
    assert len(found.logits) == len(PROMPT) + NUM_TOKENS_OF_EACH - 1
    assert torch.equal(found.logits, expected.logits[: len(found.logits)])


# Daemons

QUESTION = {"prompt": "How many apples has she?", "sampling": {"max_tokens": 24}}


@pytest.fixture(scope="module")
def text_over_tcp(deployment: Deployment) -> str:
    tcp = next(case for case in CASES if case.name == "tcp")
    return ask_daemons(tcp, deployment)


def ask_daemons(case: Case, deployment: Deployment, **edge_settings: Any) -> str:
    """Start both daemons with nothing but their YAML files, ask, and stop them."""
    keyring = case.keyring()
    number = next(_numbers)
    environment = {"PYTHONPATH": str(third_party.installed())} if case.scheme == "unix" else {}
    cloud_file = deployment.cloud_yaml(
        f"cloud-{number}.yaml", listen=case.listen_address(), **as_yaml(keyring.listener)
    )
    with Process(SERVE, cloud_file, environment=environment) as cloud:
        edge_file = deployment.edge_yaml(
            cloud.read_ready(), f"edge-{number}.yaml", **as_yaml(keyring.client), **edge_settings
        )
        with Process(EDGE, "--lines", edge_file, environment=environment) as edge:
            assert edge.read_event()["event"] == "ready"
            _, done = edge.ask(QUESTION)
            assert done["event"] == "done", done
            edge.end_input()
            assert edge.wait() == 0
            assert edge.stderr == "" or "impaired" in edge_settings
        cloud.terminate()
        assert cloud.wait() == 0
        assert cloud.stderr == ""
    return str(done["text"])


def as_yaml(credentials: Credentials) -> dict[str, Any]:
    return {
        name: config.model_dump(mode="json", exclude_none=True)
        for name, config in security(credentials).items()
    }


@pytest.mark.parametrize(
    "case",
    [case for case in REAL_CASES if case.scheme not in ("inproc", "tcp")],
    ids=lambda case: case.name,
)
def test_daemons_over_every_transport(
    case: Case, deployment: Deployment, text_over_tcp: str
) -> None:
    assert ask_daemons(case, deployment) == text_over_tcp


def test_daemons_over_a_rehearsed_network(deployment: Deployment, text_over_tcp: str) -> None:
    tcp = next(case for case in CASES if case.name == "tcp")
    worse = {"bandwidth_mbps": 50, "delay_ms": 1, "jitter_ms": 0.5}
    text = ask_daemons(tcp, deployment, impaired={"up": worse, "down": worse, "seed": 1})
    assert text == text_over_tcp
