"""The two daemons as processes of their own, as people and programs use them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from privatelora.runtime.config import EdgeConfig
from privatelora.runtime.edge import Edge
from privatelora.runtime.generation import GenerationStats
from privatelora.runtime.sampling_params import SamplingParams
from privatelora.runtime.text import TextStream
from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import EDGE, MAIN, PATIENCE_S, SERVE, Commands, Process
from tests.e2e.reference import greedy_with_logits
from tests.e2e.test_equality import FP32, assert_equal
from tests.partition.tiny import tiny_tokenizer

NUM_ROUND_TRIPS = 4
"""One a layer: the first point is folded into the step itself."""

QUESTION = {"prompt": "How many apples has she?"}
LONG = {**QUESTION, "sampling": {"max_tokens": 4000, "ignore_eos": True}}
"""An answer of several seconds."""


class World(NamedTuple):
    """A tiny Llama, one exchange per layer, with room for long answers."""

    deployment: Deployment
    reference: Any

    def greedy(self, prompt_ids: list[int], num_tokens: int) -> str:
        """What the reference says."""
        tokens, _ = greedy_with_logits(self.reference, prompt_ids, num_tokens)
        tokenizer = tiny_tokenizer()
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        stream = TextStream(tokenizer.backend_tokenizer)
        return "".join([*map(stream.push, tokens), stream.flush()])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("daemons")
    options = {"max_position_embeddings": 4096}
    return World(
        *tiny_deployment("llama", directory, model_options=options, rank_up=8, rank_down=8)
    )


def ends_well(process: Process) -> None:
    """Ask a daemon to end: it does, without complaints."""
    process.terminate()
    assert process.wait() == 0, process.stderr
    assert process.stderr == ""


@pytest.fixture(scope="module")
def address(world: World) -> Iterator[str]:
    """Where a cloud serves."""
    with Process(SERVE, world.deployment.cloud_yaml()) as cloud:
        yield cloud.read_ready()
        ends_well(cloud)


@pytest.fixture(scope="module")
def edges(world: World, address: str) -> Iterator[tuple[Process, Process]]:
    """Two edges of one person, ready."""
    config = world.deployment.edge_yaml(address, sampling={"max_tokens": 24})
    with Process(EDGE, "--lines", config) as first, Process(EDGE, "--lines", config) as second:
        for edge in (first, second):
            ready = edge.read_event()
            assert (ready["event"], ready["cloud"]) == ("ready", address)
            assert ready["software"].startswith("privatelora/")
        yield first, second
        for edge in (first, second):
            ends_well(edge)


@pytest.fixture
def edge(edges: tuple[Process, Process]) -> Process:
    return edges[0]


def test_a_prompt_is_continued_as_transformers_would(world: World, edge: Process) -> None:
    texts, done = edge.ask({**QUESTION, "id": "q1", "sampling": {"max_tokens": 40}})
    expected = world.greedy(tiny_tokenizer().encode(QUESTION["prompt"]), 40)
    assert done["text"] == expected
    assert "".join(event["text"] for event in texts) == expected
    assert len(texts) > 10
    assert {event["id"] for event in (*texts, done)} == {"q1"}
    figures = done["figures"]
    assert figures["round_trips_per_token"] == NUM_ROUND_TRIPS
    # EXCHANGE's cost, in fp32, and no more than 70 bytes of header a message.
    plan, hidden_nbytes = world.deployment.plan, 4 * 64
    to_cloud = hidden_nbytes + 4 * 4 * plan.y_size
    from_cloud = hidden_nbytes + 4 * 3 * plan.z_size
    assert 0 <= figures["bytes_to_cloud_per_token"] - to_cloud <= NUM_ROUND_TRIPS * 96
    assert 0 <= figures["bytes_from_cloud_per_token"] - from_cloud <= NUM_ROUND_TRIPS * 96


def test_a_conversation_pays_only_for_what_is_new(world: World, edge: Process) -> None:
    messages = [{"role": "user", "content": "She sells twenty-three apples."}]
    _, first = edge.ask({"messages": messages, "sampling": {"ignore_eos": True}})
    prompt_ids = tiny_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert first["figures"]["prompt_tokens"] == len(prompt_ids)
    assert first["finish_reason"] == "length"
    messages += [
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "And the weather?"},
    ]
    _, second = edge.ask({"messages": messages})
    prompt_ids = tiny_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert second["text"] == world.greedy(prompt_ids, 24)
    assert second["figures"]["cached_tokens"] >= first["figures"]["prompt_tokens"]


def test_seeds_and_sampling_are_the_requests(edges: tuple[Process, Process]) -> None:
    first, second = edges

    def text(edge: Process, **sampling: Any) -> str:
        _, done = edge.ask({**QUESTION, "sampling": {"ignore_eos": True, **sampling}})
        assert done["event"] == "done", done
        return str(done["text"])

    chance = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.001}
    assert text(first, **chance, seed=1) == text(second, **chance, seed=1)
    assert text(first, **chance, seed=1) != text(first, **chance, seed=2)
    greedy = text(first)
    assert text(first, **chance | {"top_k": 1}, seed=3) == greedy
    assert text(first, repetition_penalty=5.0) != greedy
    stop = greedy[10:13]
    _, stopped = first.ask({**QUESTION, "sampling": {"ignore_eos": True, "stop": [stop]}})
    assert stopped["text"] == greedy[: greedy.index(stop)]
    assert stopped["finish_reason"] == "stop"


BAD_LINES: dict[str, tuple[str | bytes | dict[str, Any], str]] = {
    "not JSON": ("{prompt: hello}", "not a line of JSON: Expecting property name"),
    "nested too deeply": ("[" * 100_000, "not a line of JSON"),
    "number too long": ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "not a line of JSON"),
    "not an object": ("[1]", "Input should be"),
    "unknown key": ({"promt": "a"}, "unknown key 'promt'; did you mean prompt?"),
    "unknown key in a message": (
        {"messages": [{"role": "user", "content": "a", "name": "Eve"}]},
        "unknown key 'messages.0.name'; known keys: role, content",
    ),
    "both prompt and messages": (
        {**QUESTION, "messages": [{"role": "user", "content": "a"}]},
        "give either messages or prompt",
    ),
    "neither": ({"id": 1}, "give either messages or prompt"),
    "no messages": ({"messages": []}, "messages: List should have at least 1 item"),
    "unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role: Input"),
    "temperature below 0": (
        {**QUESTION, "sampling": {"temperature": -1}},
        "sampling: temperature: Input should be greater than or equal to 0",
    ),
    "top_p of 0": ({**QUESTION, "sampling": {"top_p": 0}}, "sampling: top_p: Input should be"),
    "no number": (
        '{"prompt": "a", "sampling": {"temperature": NaN}}',
        "sampling: temperature: Input should be",
    ),
    "max_tokens 0": ({**QUESTION, "sampling": {"max_tokens": 0}}, "sampling: max_tokens: Input"),
    "unknown sampling key": (
        {**QUESTION, "sampling": {"top_n": 5}},
        "sampling: unknown key 'top_n'; did you mean top_p or top_k?",
    ),
    "longer than the context": (
        {"prompt": "a" * 5000},
        "tokens and the context holds 2048: no room is left for an answer; shorten the prompt",
    ),
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "half a character in JSON": ('{"prompt": "a\\ud800"}', "not valid Unicode at character 2"),
    "no UTF-8": (b'{"prompt": "caf\xe9"}', "not valid Unicode at character 4: send UTF-8"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_gets_an_error_event(edge: Process, name: str) -> None:
    line, message = BAD_LINES[name]
    edge.write(line)
    texts, event = edge.read_answer()
    assert texts == []
    assert (event["event"], event["kind"]) == ("error", "RequestError")
    assert message in event["error"]
    assert "\n" not in event["error"]
    _, good = edge.ask({**QUESTION, "sampling": {"max_tokens": 2}})
    assert good["event"] == "done"


def test_every_request_before_the_end_of_input_is_answered(
    world: World, address: str, commands: Commands
) -> None:
    config = world.deployment.edge_yaml(address, "eof.yaml", sampling={"max_tokens": 5})
    lines = '{"prompt": "The weather", "id": 1}\n\n{"oops": 1}\n{"prompt": "The wind", "id": 2}'
    result = commands.run(EDGE, "--lines", config, stdin=lines)
    assert (result.code, result.err) == (0, "")
    events = [line for line in result.out.splitlines() if '"text", ' not in line]
    kinds = [("ready", None), ("done", 1), ("error", None), ("done", 2)]
    assert len(events) == len(kinds)
    for line, (kind, number) in zip(events, kinds, strict=True):
        assert f'"event": "{kind}"' in line
        assert (f'"id": {number}' in line) == (number is not None)


def test_chat_in_a_terminal(world: World, address: str, commands: Commands) -> None:
    config = world.deployment.edge_yaml(address, "chat.yaml", sampling={"max_tokens": 8})
    result = commands.run(
        MAIN, "chat", config, stdin="How many?\n\n" + "letters " * 2000 + "\nHi\n"
    )
    assert result.code == 0, result.err
    figures, error, more_figures = filter(None, result.err.splitlines())
    assert "8 tokens · first after" in figures
    assert "no room is left for an answer; shorten the prompt" in error
    assert error.startswith("error: the prompt has ")
    assert "tokens/s" in more_figures
    messages = [{"role": "user", "content": "How many?"}]
    prompt_ids = tiny_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert result.out.startswith(world.greedy(prompt_ids, 8))


def test_the_cloud_survives_an_edge_that_is_killed(world: World) -> None:
    """Its only session is held by an edge that dies in the middle of an answer."""
    deployment = world.deployment
    with ExitStack() as stack:
        cloud = stack.enter_context(
            Process(SERVE, deployment.cloud_yaml("one-session.yaml", max_sessions=1, max_waiting=0))
        )
        config = deployment.edge_yaml(
            cloud.read_ready(), "one-session-edge.yaml", max_positions=4096
        )
        first, second = (stack.enter_context(Process(EDGE, "--lines", config)) for _ in range(2))
        for edge in (first, second):
            assert edge.read_event()["event"] == "ready"

        first.write(LONG)
        assert first.read_event()["event"] == "text"
        _, refused = second.ask(QUESTION)
        assert refused["kind"] == "CapacityError"
        assert "this cloud serves 1 sessions already" in refused["error"]
        first.kill()
        assert first.wait() == -9
        assert not [line for line in first.read_rest() if '"done"' in line]

        request = {**QUESTION, "sampling": {"max_tokens": 20}}
        deadline = time.monotonic() + PATIENCE_S
        while (answer := second.ask(request)[1])["event"] == "error":
            assert answer["kind"] == "CapacityError"
            assert time.monotonic() < deadline
        assert answer["text"] == world.greedy(tiny_tokenizer().encode(QUESTION["prompt"]), 20)

        second.write(LONG)
        assert second.read_event()["event"] == "text"
        ends_well(second)
        assert not [line for line in second.read_rest() if '"done"' in line]
        ends_well(cloud)


def test_an_edge_outlives_its_cloud(world: World) -> None:
    """The cloud ends in the middle of an answer, stays away, and comes back."""
    deployment = world.deployment
    with ExitStack() as stack:
        config = deployment.cloud_yaml("leaving.yaml", drain_timeout_s=0)
        cloud = stack.enter_context(Process(SERVE, config))
        address = cloud.read_ready()
        config = deployment.edge_yaml(
            address, "staying.yaml", max_positions=4096, reconnect_timeout_s=0
        )
        edge = stack.enter_context(Process(EDGE, "--lines", config))
        assert edge.read_event()["event"] == "ready"

        edge.write(LONG)
        assert edge.read_event()["event"] == "text"
        ends_well(cloud)
        _, lost = edge.read_answer()
        assert lost["kind"] == "ConnectionClosed"
        _, away = edge.ask(QUESTION)
        assert away["kind"] == "ConnectError"
        assert "check that the peer is running" in away["error"]

        cloud = stack.enter_context(
            Process(SERVE, deployment.cloud_yaml("back.yaml", listen=address))
        )
        assert cloud.read_ready() == address
        _, back = edge.ask({**QUESTION, "sampling": {"max_tokens": 20}})
        assert back["text"] == world.greedy(tiny_tokenizer().encode(QUESTION["prompt"]), 20)
        edge.end_input()
        assert edge.wait() == 0
        assert edge.stderr == ""
        ends_well(cloud)


async def test_edges_and_sessions_side_by_side(
    world: World, address: str, edges: tuple[Process, Process]
) -> None:
    """Two daemons, and three sessions of a third edge, all say what they say alone."""
    requests = [
        {"prompt": prompt, "sampling": {"max_tokens": 300, "ignore_eos": True, **sampling}}
        for prompt, sampling in (
            ("The weather in the mountains", {}),
            ("Twenty-three apples", {"temperature": 1.0, "seed": 1}),
        )
    ]
    alone = [edge.ask(request)[1]["text"] for edge, request in zip(edges, requests, strict=True)]
    third = Edge(
        EdgeConfig(
            cloud=address,
            shard=world.deployment.edge_shard,
            adapter=world.deployment.adapter_file,
            payload=FP32,
        )
    )

    async def say(prompt: str, seed: int) -> str:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=40, ignore_eos=True)
        prompt_ids = third.text.encode_prompt(prompt)
        pieces = third.service.stream(None, prompt_ids, params, GenerationStats())
        async with aclosing(pieces):
            return "".join([piece async for piece in pieces])

    sessions = [("When the wind comes", 1), ("How many letters", 2), ("He answers", 3)]
    try:
        said_alone = [await say(*session) for session in sessions]
        for edge, request in zip(edges, requests, strict=True):
            edge.write(request)
            assert edge.read_event()["event"] == "text"
        together = await asyncio.gather(*(say(*session) for session in sessions))
    finally:
        await third.aclose()
    assert list(together) == said_alone
    assert [edge.read_answer()[1]["text"] for edge in edges] == alone
    assert len({*alone, *said_alone}) == 5


async def test_equal_to_transformers_over_two_processes(world: World, address: str) -> None:
    await assert_equal(address, world.deployment, world.reference)


async def test_equal_to_transformers_with_layers_at_the_edge(tmp_path: Path) -> None:
    deployment, reference = tiny_deployment(
        "qwen3", tmp_path, every=2, rank_up=12, rank_down=5, edge_first=1, edge_last=1
    )
    with Process(SERVE, deployment.cloud_yaml()) as cloud:
        await assert_equal(cloud.read_ready(), deployment, reference)
        ends_well(cloud)
