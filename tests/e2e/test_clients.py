"""Many clients of one cloud, all of them daemons: it keeps within its limits and serves them."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from privatelora.runtime.client_tokens import digest
from privatelora.runtime.kv_cache import BLOCK_SIZE
from tests.e2e.deployment import tiny_deployment, write_yaml
from tests.e2e.processes import EDGE, PATIENCE_S, SERVE, Process
from tests.e2e.test_daemons import World
from tests.partition.tiny import tiny_tokenizer

NUM_EDGES, CONVERSATIONS_EACH, NUM_TURNS, ANSWER_TOKENS = 3, 8, 3, 12
MAX_CACHED_POSITIONS = 768
MAX_GROWTH_NBYTES = 64 * 2**20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny Llama, one exchange per layer, and its reference."""
    directory = tmp_path_factory.mktemp("clients")
    return World(*tiny_deployment("llama", directory, rank_up=8, rank_down=8))


# Far more conversations than there is room for


class Conversation:
    """A few turns, each said with all before it."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.answers: list[str] = []
        self.messages: list[dict[str, str]] = []
        self._ask()

    def take(self, answer: str) -> None:
        self.answers.append(answer)
        self.messages.append({"role": "assistant", "content": answer})
        self._ask()

    def _ask(self) -> None:
        turn = len(self.answers)
        question = f"{self._number} apples, and the weather of day {7 * self._number + turn}?"
        self.messages.append({"role": "user", "content": question})


def expected_answers(world: World, number: int) -> list[str]:
    """What the reference says in a conversation."""
    conversation, tokenizer = Conversation(number), tiny_tokenizer()
    for _ in range(NUM_TURNS):
        prompt_ids = tokenizer.apply_chat_template(
            conversation.messages, add_generation_prompt=True, return_dict=False
        )
        conversation.take(world.greedy(prompt_ids, ANSWER_TOKENS))
    return conversation.answers


def converse(url: str, conversation: Conversation) -> None:
    """Have all turns; who is refused for lack of room tries again."""
    deadline = time.monotonic() + PATIENCE_S
    for _ in range(NUM_TURNS):
        body = {"messages": conversation.messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        while (answer := ask(url, body)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        conversation.take(answer)


def ask(url: str, body: dict[str, Any]) -> str | None:
    """The answer, or None if there is no room for it now."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as refusal:
        with refusal as reply:
            status, retry_after, text = reply.code, reply.headers["Retry-After"], reply.read()
    assert status == 429, text
    assert int(retry_after) >= 1  # longer than a test has
    return None


class Watch:
    """The most and the last of what a cloud's metrics say, asked again and again."""

    def __init__(self, cloud: Process) -> None:
        found = re.search(r"metrics at (http://\S+)", cloud.stderr)
        assert found, cloud.stderr
        self._url = found[1]
        self._memory = psutil.Process(cloud.pid)
        self.first_nbytes = self.most_nbytes = self._memory.memory_info().rss
        self.last: dict[str, float] = {}
        self.most: dict[str, float] = {}

    def look(self) -> None:
        with urllib.request.urlopen(self._url, timeout=PATIENCE_S) as answer:
            text = answer.read().decode()
        found = re.findall(r"^privatelora_cloud_(\w+) (\S+)$", text, re.MULTILINE)
        self.last = {name: float(value) for name, value in found}
        for name, value in self.last.items():
            self.most[name] = max(value, self.most.get(name, 0.0))
        self.most_nbytes = max(self._memory.memory_info().rss, self.most_nbytes)


def test_everybody_is_served_within_the_limits(world: World) -> None:
    """24 conversations of three edges on a cloud with room for 6 sessions, and memory for fewer.

    Sessions wait, are refused, evicted and rebuilt, and every answer is what the reference says.
    """
    num_conversations = NUM_EDGES * CONVERSATIONS_EACH
    config = world.deployment.cloud_yaml(
        "small.yaml",
        max_sessions=6,
        max_sessions_per_client=100,
        max_cached_positions=MAX_CACHED_POSITIONS,
        max_waiting=3,
        max_wait_s=0.5,
        min_idle_s=0.02,
        metrics="127.0.0.1:0",
    )
    with ExitStack() as stack:
        cloud = stack.enter_context(Process(SERVE, config, "--verbose"))
        settings = {
            "http": {"listen": "127.0.0.1:0"},
            "max_conversations": CONVERSATIONS_EACH,
            "max_positions": 256,
        }
        file = world.deployment.edge_yaml(cloud.read_ready(), "many.yaml", **settings)
        edges = [stack.enter_context(Process(EDGE, file)) for _ in range(NUM_EDGES)]
        urls = [edge.read_ready() for edge in edges]
        for number, url in enumerate(urls):  # what is used once and kept
            converse(url, Conversation(number))
        watch = Watch(cloud)
        conversations = [Conversation(number) for number in range(num_conversations)]
        with ThreadPoolExecutor(num_conversations) as pool:
            talking = [
                pool.submit(converse, urls[number % NUM_EDGES], conversation)
                for number, conversation in enumerate(conversations)
            ]
            while wait(talking, timeout=0.01).not_done:
                watch.look()
            for one in talking:
                one.result()
        watch.look()

    for number, conversation in enumerate(conversations):
        assert conversation.answers == expected_answers(world, number)
    assert watch.most["waiting_sessions"] > 0
    assert watch.last["sessions_refused_total"] > 0
    assert watch.last["sessions_evicted_total"] > 0
    assert watch.last["sessions_opened_total"] > num_conversations  # so some were rebuilt
    assert watch.most["sessions"] <= 6
    assert watch.last["kv_blocks"] == MAX_CACHED_POSITIONS // BLOCK_SIZE
    assert 0 < watch.most["kv_blocks_used"] <= watch.last["kv_blocks"]
    assert watch.most_nbytes - watch.first_nbytes < MAX_GROWTH_NBYTES


# Tokens


def test_a_cloud_that_wants_a_token(world: World) -> None:
    deployment, token, unknown = world.deployment, "t" * 43, "u" * 43
    write_yaml(deployment.directory / "tokens.yaml", {"alice": digest(token)})
    (deployment.directory / "alice.token").write_text(f"{token}\n")
    with ExitStack() as stack:
        config = deployment.cloud_yaml("tokens-cloud.yaml", tokens="tokens.yaml")
        cloud = stack.enter_context(Process(SERVE, config, "--verbose"))
        address = cloud.read_ready()
        file = deployment.edge_yaml(address, "alice.yaml", token={"file": "alice.token"})
        edge = stack.enter_context(Process(EDGE, "--lines", file, "--verbose"))
        assert edge.read_event()["event"] == "ready"
        assert (
            edge.ask({"prompt": "How many?", "sampling": {"max_tokens": 3}})[1]["event"] == "done"
        )
        assert "joined as token:alice: privatelora/" in cloud.stderr

        for name, said in (("NONE", "and none was sent"), ("UNKNOWN", "does not know the token")):
            env = None if name == "NONE" else {"env": "EDGE_TOKEN"}
            file = deployment.edge_yaml(address, f"{name}.yaml", token=env)
            other = Process(EDGE, "--lines", file, environment={"EDGE_TOKEN": unknown})
            stranger = stack.enter_context(other)
            assert stranger.wait() == 1
            assert stranger.read_rest() == []
            assert stranger.stderr.startswith("error: this cloud ")
            assert stranger.stderr.count("\n") == 1
            assert said in stranger.stderr
            assert said in cloud.stderr
        cloud.terminate()
        assert cloud.wait() == 0
        for process in (cloud, edge, stranger):
            assert token not in process.stderr
            assert unknown not in process.stderr
