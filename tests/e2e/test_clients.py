"""Many clients on one cloud, as daemons: it stays within its limits, and everybody is served."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import yaml

from privatelora.runtime.client_tokens import digest
from privatelora.runtime.kv_cache import BLOCK_SIZE
from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import EDGE, PATIENCE_S, SERVE, Process
from tests.e2e.reference import greedy_with_logits
from tests.partition.tiny import tiny_tokenizer

NUM_EDGES, SESSIONS_EACH, NUM_TURNS = 3, 8, 3
MAX_GROWTH_NBYTES = 64 * 2**20
ANSWER_TOKENS = 12
TOKENS = {"quiet": "q" * 43, "flood": "f" * 43}


class World(NamedTuple):
    """A tiny Llama, one exchange per layer."""

    deployment: Deployment
    reference: Any


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("clients")
    options = {"max_position_embeddings": 4096}
    return World(
        *tiny_deployment("llama", directory, model_options=options, rank_up=8, rank_down=8)
    )


class Watched:
    """What a cloud's metrics say, asked again and again."""

    def __init__(self, cloud: Process) -> None:
        found = re.search(r"metrics at (http://\S+)", cloud.stderr)
        assert found, cloud.stderr
        self._url = found[1]
        self.most: defaultdict[str, float] = defaultdict(float)

    def look(self) -> dict[str, float]:
        text = httpx.get(self._url, timeout=PATIENCE_S).text
        values = {
            name: float(value)
            for name, value in re.findall(r"^privatelora_cloud_(\w+) (\S+)$", text, re.MULTILINE)
        }
        for name, value in values.items():
            self.most[name] = max(self.most[name], value)
        return values


# Far more conversations than there is room for


class Conversation:
    """A few turns that are said to an edge, each with all before it."""

    def __init__(self, number: int) -> None:
        self.messages = [{"role": "user", "content": self._question(number, 0)}]
        self.number = number
        self.answers: list[str] = []

    @staticmethod
    def _question(number: int, turn: int) -> str:
        return f"{number} apples, {turn} letters, and the weather of day {7 * number + turn}?"

    def take(self, answer: str) -> None:
        self.answers.append(answer)
        question = self._question(self.number, len(self.answers))
        self.messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": question},
        ]


def expected_answers(world: World, number: int) -> list[str]:
    """What the reference says."""
    conversation, tokenizer = Conversation(number), tiny_tokenizer()
    for _ in range(NUM_TURNS):
        prompt_ids = tokenizer.apply_chat_template(
            conversation.messages, add_generation_prompt=True, return_dict=False
        )
        tokens, _ = greedy_with_logits(world.reference, prompt_ids, ANSWER_TOKENS)
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        conversation.take(tokenizer.decode(tokens))
    return conversation.answers


async def converse(client: httpx.AsyncClient, conversation: Conversation) -> None:
    """All turns; who is refused for lack of room tries again."""
    deadline = time.monotonic() + PATIENCE_S
    for _ in range(NUM_TURNS):
        request = {"messages": conversation.messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        while (reply := await client.post("/v1/chat/completions", json=request)).status_code != 200:
            assert reply.status_code == 429, reply.text
            assert int(reply.headers["Retry-After"]) >= 1
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        conversation.take(reply.json()["choices"][0]["message"]["content"])


async def test_everybody_is_served_within_the_limits(world: World) -> None:
    """24 conversations of three edges where there is room for 6 sessions, and memory for fewer.

    Sessions wait, are refused, evicted and rebuilt; every answer is the reference's all the same.
    """
    deployment = world.deployment
    config = deployment.cloud_yaml(
        "small.yaml",
        max_sessions=6,
        max_sessions_per_client=100,
        max_cached_positions=512,
        max_waiting=3,
        max_wait_s=0.3,
        min_idle_s=0.02,
        metrics="127.0.0.1:0",
    )
    with ExitStack() as stack:
        cloud = stack.enter_context(Process(SERVE, config, "--verbose"))
        address = cloud.read_ready()
        edges = []
        for number in range(NUM_EDGES):
            settings = {"http": {"listen": "127.0.0.1:0"}, "max_conversations": SESSIONS_EACH}
            file = deployment.edge_yaml(address, f"edge-{number}.yaml", **settings)
            edges.append(stack.enter_context(Process(EDGE, file)))
        urls = [edge.read_ready() for edge in edges]
        watched = Watched(cloud)
        memory = psutil.Process(cloud.pid).memory_info
        before_nbytes, most_nbytes = memory().rss, 0
        conversations = [Conversation(number) for number in range(NUM_EDGES * SESSIONS_EACH)]
        limits = httpx.Limits(max_connections=None)
        async with asyncio.TaskGroup() as group:
            clients = [
                await stack_client(url, limits) for url in urls
            ]
