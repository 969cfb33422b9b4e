"""The official client, unmodified, against both daemons; and bad requests on bare sockets."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from privatelora.runtime.text import TextStream
from tests.e2e.deployment import tiny_deployment
from tests.e2e.http_world import MAX_POSITIONS, HttpWorld, http_world, until
from tests.e2e.processes import EDGE, PATIENCE_S, SERVE, Process
from tests.e2e.reference import greedy_with_logits
from tests.partition.tiny import tiny_tokenizer
from tests.unit.http_bad_requests import CHAT, CHAT_BODIES, COMPLETION_BODIES, NOT_JSON, RAW

QUESTION = "How many apples has she?"
HELLO: Any = [{"role": "user", "content": QUESTION}]
ENDLESS: dict[str, Any] = {"max_tokens": MAX_POSITIONS, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def reference_and_world(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Any, HttpWorld]]:
    deployment, reference = tiny_deployment(
        "llama",
        tmp_path_factory.mktemp("http"),
        model_options={"max_position_embeddings": MAX_POSITIONS},
        rank_up=8,
        rank_down=8,
    )
    with http_world(
        deployment, max_positions=MAX_POSITIONS, sampling={"max_tokens": 12}
    ) as started:
        yield reference, started


@pytest.fixture(scope="module")
def reference(reference_and_world: tuple[Any, HttpWorld]) -> Any:
    return reference_and_world[0]


@pytest.fixture(scope="module")
def world(reference_and_world: tuple[Any, HttpWorld]) -> HttpWorld:
    return reference_and_world[1]


@pytest.fixture(scope="module")
def client(world: HttpWorld) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def greedy(reference: Any, prompt_ids: list[int], num_tokens: int) -> str:
    tokens, _ = greedy_with_logits(reference, prompt_ids, num_tokens)
    tokenizer = tiny_tokenizer()
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    stream = TextStream(tokenizer.backend_tokenizer)
    return "".join([*map(stream.push, tokens), stream.flush()])


def chat_ids(messages: list[Any]) -> list[int]:
    ids = tiny_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["adapter", "base"]
    assert client.models.retrieve("base").id == "base"


def test_chat_says_what_transformers_says(client: openai.OpenAI, reference: Any) -> None:
    answer = client.chat.completions.create(model="adapter", messages=HELLO, temperature=0)
    expected = greedy(reference, chat_ids(HELLO), 12)
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(chat_ids(HELLO))
    base = client.chat.completions.create(model="base", messages=HELLO, temperature=0)
    assert base.choices[0].message.content != expected


def test_streamed_chat(client: openai.OpenAI, reference: Any) -> None:
    stream = client.chat.completions.create(
        model="adapter",
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=3,
    )
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == greedy(reference, chat_ids(HELLO), 12)
    entries = [e for c in choices if c.logprobs is not None for e in c.logprobs.content or []]
    assert len(entries) == 12
    for entry in entries:  # greedy, so the first of the most likely was taken
        assert entry.top_logprobs[0].bytes == entry.bytes
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )


def test_logprobs_of_a_prompt_are_those_of_transformers(
    client: openai.OpenAI, reference: Any
) -> None:
    prompt_ids = tiny_tokenizer().encode(QUESTION)
    answer = client.completions.create(
        model="adapter", prompt=prompt_ids, echo=True, logprobs=5, max_tokens=3, temperature=0
    )
    [choice] = answer.choices
    tokens, logits = greedy_with_logits(reference, prompt_ids, 3)
    assert choice.text == QUESTION + greedy(reference, prompt_ids, 3)
    assert choice.logprobs is not None
    told = choice.logprobs.token_logprobs
    assert told is not None
    assert told[0] is None
    logprobs = logits.log_softmax(-1)
    for position, token in enumerate([*prompt_ids, *tokens][1:]):
        assert math.isclose(told[position + 1], float(logprobs[position, token]), abs_tol=1e-3)
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[: len(prompt_ids)] == [
        len(tiny_tokenizer().decode(prompt_ids[:end])) for end in range(len(prompt_ids))
    ]
    scored = client.completions.create(
        model="adapter", prompt=QUESTION, echo=True, logprobs=0, max_tokens=0
    )
    assert scored.choices[0].text == QUESTION
    assert scored.choices[0].logprobs is not None
    assert len(scored.choices[0].logprobs.tokens or []) == len(prompt_ids)


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "ready": {"type": "boolean"}},
        "required": ["color", "ready"],
        "additionalProperties": False,
    }
    for seed in range(3):
        answer = client.chat.completions.create(
            model="adapter",
            messages=HELLO,
            temperature=1.0,
            seed=seed,
            max_tokens=400,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": schema, "strict": True},
            },
        )
        content = json.loads(answer.choices[0].message.content or "")
        assert content["color"] in ("red", "blue")
        assert isinstance(content["ready"], bool)
        assert answer.choices[0].finish_reason == "stop"


def test_errors_have_their_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="base", messages=HELLO, temperature=7)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="base", prompt=[5] * MAX_POSITIONS, stream=True)
    assert long.value.code == "context_length_exceeded"


def test_eight_at_once_say_what_they_say_alone(client: openai.OpenAI) -> None:
    def say(number: int) -> str:
        return (
            client.completions.create(
                model="adapter",
                prompt=f"{number} apples",
                max_tokens=40,
                temperature=1.0,
                seed=number,
                extra_body={"ignore_eos": True},
            )
            .choices[0]
            .text
        )

    alone = [say(number) for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(say, range(8)))
    assert together == alone
    assert len(set(alone)) == 8


def test_closing_a_stream_frees_the_session(world: HttpWorld, client: openai.OpenAI) -> None:
    kept = world.cloud_metric("sessions")
    opened = world.cloud_metric("sessions_opened_total")
    stream = client.completions.create(model="base", prompt="Z", stream=True, **ENDLESS)
    next(iter(stream))
    assert world.cloud_metric("sessions_opened_total") == opened + 1
    stream.close()
    # It may have taken the place of one that was kept for its next turn.
    until(lambda: world.cloud_metric("sessions") <= kept)
    until(lambda: idle(world))


def test_giving_up_on_an_answer_frees_the_session(world: HttpWorld, client: openai.OpenAI) -> None:
    kept = world.cloud_metric("sessions")
    hasty = client.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        hasty.completions.create(model="base", prompt="Zz", **ENDLESS)
    until(lambda: world.cloud_metric("sessions") <= kept)
    until(lambda: idle(world))


def idle(world: HttpWorld) -> bool:
    reply = ask_raw(world, b"GET /v1/privatelora/status HTTP/1.1\r\nHost: localhost\r\n\r\n")
    status = json.loads(reply.partition(b"\r\n\r\n")[2])
    return bool(status["busy_conversations"] == 0)


def ask_raw(world: HttpWorld, data: bytes) -> bytes:
    """Send bytes as they are; all of one response."""
    parts = urlsplit(world.url)
    address = (parts.hostname, parts.port)
    with socket.create_connection(address, PATIENCE_S) as sock, sock.makefile("rb") as file:
        sock.sendall(data)
        head = b""
        length = 0
        while (line := file.readline()) != b"\r\n":
            assert line, head
            head += line
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        return head + b"\r\n" + file.read(length)


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_bad_requests_on_bare_sockets(world: HttpWorld, client: openai.OpenAI) -> None:
    cases = [(name, data, status) for name, (data, status) in RAW.items()]
    cases += [(name, post(CHAT, body), 400) for name, (body, _) in NOT_JSON.items()]
    for path, bodies in ((CHAT, CHAT_BODIES), ("/v1/completions", COMPLETION_BODIES)):
        for name, (value, _, _) in bodies.items():
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            cases.append((name, post(path, body), 400))
    assert len(cases) > 90
    for name, data, status in cases:
        head, _, body = ask_raw(world, data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), (name, head, body)
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, name
        assert "Traceback" not in error["message"], name
    assert client.completions.create(model="base", prompt="a", max_tokens=1).choices


def test_stopping_lets_answers_end(world: HttpWorld) -> None:
    """The first signal drains, the second does not wait."""
    deployment = world.deployment
    cloud_file = deployment.cloud_yaml("stop-cloud.yaml")
    with Process(SERVE, cloud_file) as cloud:
        config = deployment.edge_yaml(
            cloud.read_ready(),
            "stop-edge.yaml",
            max_positions=MAX_POSITIONS,
            http={"listen": "127.0.0.1:0"},
        )
        for patient in (True, False):
            with Process(EDGE, config) as edge:
                url = edge.read_ready()
                with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
                    stream = client.completions.create(
                        model="base",
                        prompt="Z",
                        stream=True,
                        max_tokens=200 if patient else MAX_POSITIONS,
                        extra_body={"ignore_eos": True},
                    )
                    chunks = iter(stream)
                    next(chunks)
                    edge.terminate()
                    until(partial(is_draining, client))
                    if patient:
                        assert list(chunks)[-1].choices[0].finish_reason == "length"
                    else:
                        edge.terminate()
                        with pytest.raises(openai.APIConnectionError):
                            list(chunks)
                    stream.close()
                assert edge.wait() == 0, edge.stderr
                assert edge.stderr == ""


def is_draining(client: openai.OpenAI) -> bool:
    try:
        client.models.list()
    except openai.InternalServerError as refused:
        return refused.code == "shutting_down"
    return False


def test_a_cloud_that_goes_away_and_comes_back(world: HttpWorld) -> None:
    deployment = world.deployment
    with Process(SERVE, deployment.cloud_yaml("away.yaml")) as cloud:
        address = cloud.read_ready()
        config = deployment.edge_yaml(
            address,
            "staying.yaml",
            max_positions=MAX_POSITIONS,
            reconnect_timeout_s=0,
            http={"listen": "127.0.0.1:0"},
        )
        with (
            Process(EDGE, config) as edge,
            openai.OpenAI(base_url=f"{edge.read_ready()}/v1", api_key="x", max_retries=0) as client,
        ):
            stream = client.completions.create(model="base", prompt="Z", stream=True, **ENDLESS)
            chunks = iter(stream)
            next(chunks)
            cloud.kill()
            with pytest.raises(openai.APIError) as lost:
                list(chunks)
            assert lost.value.code == "cloud_unreachable"
            cloud.wait()
            with pytest.raises(openai.InternalServerError) as away:
                client.completions.create(model="base", prompt="Z")
            assert (away.value.status_code, away.value.code) == (503, "cloud_unreachable")
            with Process(SERVE, deployment.cloud_yaml("back.yaml", listen=address)) as back:
                assert back.read_ready() == address
                assert client.completions.create(model="base", prompt="Z", max_tokens=2).choices
                edge.terminate()
                assert edge.wait() == 0
                assert edge.stderr == ""


def test_a_key_and_what_is_refused_at_the_start(
    world: HttpWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = world.deployment
    config = deployment.edge_yaml("tcp://127.0.0.1:1", "open.yaml", http={"listen": "0.0.0.0:0"})
    with Process(EDGE, config) as edge:
        assert edge.wait() == 1
        [line] = edge.stderr.splitlines()
        assert "can be reached from other machines; set api_key" in line
    with Process(SERVE, deployment.cloud_yaml("key-cloud.yaml")) as cloud:
        config = deployment.edge_yaml(
            cloud.read_ready(),
            "key.yaml",
            http={"listen": "0.0.0.0:0", "api_key": {"env": "EDGE_TEST_KEY"}},
        )
        with Process(EDGE, config, environment={"EDGE_TEST_KEY": "secret-key"}) as edge:
            url = edge.read_ready().replace("0.0.0.0", "127.0.0.1")
            with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError) as refused:
                    client.models.list()
                assert refused.value.code == "invalid_api_key"
                good = client.with_options(api_key="secret-key")
                assert good.completions.create(model="base", prompt="a", max_tokens=1).choices
            edge.terminate()
            assert edge.wait() == 0
            assert "secret" not in edge.stderr + "".join(edge.read_rest())
