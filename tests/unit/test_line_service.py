"""The edge's service over lines: every line gets its answer, whatever it is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from privatelora.errors import ConnectionClosed
from privatelora.runtime.line_service import MAX_LINE_CHARS, LineService
from tests.partition.tiny import tiny_tokenizer
from tests.unit.fakes import FakeModel, fake_service
from tests.unit.world import world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

Event = dict[str, Any]
EOS = tiny_tokenizer().eos_token_id
PROMPT = {"prompt": "The wind"}


class Speaker:
    """A service whose model continues every prompt with ``answer``."""

    def __init__(
        self,
        answer: str = " comes from the north",
        *,
        system_prompt: str | None = None,
        max_positions: int = 64,
        **defaults: Any,
    ) -> None:
        self.tokenizer = tiny_tokenizer()
        self._script: list[int] = [*self.tokenizer.encode(answer), EOS]
        self.model = FakeModel(self._next, max_positions)
        self.prompts: list[str] = []
        self._edge = fake_service(self.model, system_prompt=system_prompt, **defaults)
        self._service = LineService(self._edge)

    def _next(self, token_ids: list[int]) -> int:
        """What follows as much of the answer as ``token_ids`` end with."""
        for length in range(len(self._script) - 1, 0, -1):
            if token_ids[-length:] == self._script[:length]:
                return self._script[length]
        self.prompts.append(self.tokenizer.decode(token_ids))
        return self._script[0]

    async def serve(self, *requests: Any) -> list[Event]:
        async def lines() -> AsyncIterator[str]:
            for request in requests:
                yield request if isinstance(request, str) else json.dumps(request) + "\n"

        events: list[Event] = []
        await self._service.run(lines(), events.append)
        await self._edge.aclose()
        for event in events:
            json.dumps(event)  # what it emits can be written down
        return events


def ends(events: list[Event]) -> list[Event]:
    return [event for event in events if event["event"] != "text"]


async def test_a_prompt_is_continued_piece_by_piece() -> None:
    events = await Speaker().serve(PROMPT)
    *pieces, done = events
    assert len(pieces) > 3
    assert all(set(piece) == {"event", "text"} and piece["text"] for piece in pieces)
    assert done["event"] == "done"
    assert done["text"] == "".join(piece["text"] for piece in pieces) == " comes from the north"
    assert done["finish_reason"] == "stop"
    assert done["figures"]["completion_tokens"] == len(pieces) + 1


async def test_messages_go_through_the_chat_template() -> None:
    speaker = Speaker()
    await speaker.serve({"messages": [{"role": "user", "content": "Hi"}]})
    assert speaker.prompts == ["<|start|>user\nHi<|end|>\n<|start|>assistant\n"]


async def test_the_system_prompt_comes_first_unless_there_is_one() -> None:
    speaker = Speaker(system_prompt="Be brief")
    await speaker.serve(
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "system", "content": "Be long"}, {"role": "user", "content": "Hi"}]},
        PROMPT,
    )
    assert [prompt.partition("<|end|>")[0] for prompt in speaker.prompts] == [
        "<|start|>system\nBe brief",
        "<|start|>system\nBe long",
        "The wind",
    ]


async def test_sampling_overrides_the_defaults() -> None:
    speaker = Speaker(max_tokens=2)
    short, long, stopped = ends(
        await speaker.serve(
            PROMPT,
            {**PROMPT, "sampling": {"max_tokens": 100}},
            {**PROMPT, "sampling": {"max_tokens": 100, "stop": ["from"]}},
        )
    )
    assert (short["finish_reason"], short["figures"]["completion_tokens"]) == ("length", 2)
    assert (long["finish_reason"], long["text"]) == ("stop", " comes from the north")
    assert (stopped["finish_reason"], stopped["text"]) == ("stop", " comes ")


async def test_the_cache_is_kept_from_line_to_line() -> None:
    speaker = Speaker()
    first, second = ends(await speaker.serve(PROMPT, PROMPT))
    num_prompt = first["figures"]["prompt_tokens"]
    assert first["figures"]["cached_tokens"] == 0
    assert second["figures"]["cached_tokens"] == num_prompt - 1
    assert [sequence.closed for sequence in speaker.model.sequences] == [True]


@pytest.mark.parametrize("tag", [7, 0, "seven", ""])
async def test_ids_come_back_with_every_event(tag: str | int) -> None:
    events = await Speaker(max_positions=20).serve(
        {"id": tag, **PROMPT},
        {"id": tag, "prompt": "long " * 50},
        {"id": tag, **PROMPT, "sampling": {"top_k": -1}},
        {"id": tag, "prompt": 5},
        {"id": tag, "nonsense": 5},
        {"id": tag},
    )
    assert [event["event"] for event in ends(events)] == ["done", *["error"] * 5]
    assert all(event["id"] == tag for event in events)


async def test_without_an_id_there_is_none() -> None:
    for event in await Speaker().serve(PROMPT, "{"):
        assert "id" not in event


BAD_LINES: dict[str, tuple[Any, str]] = {
    "no JSON": ("hello", "not a line of JSON"),
    "cut off": ('{"prompt": "x', "not a line of JSON"),
    "a list": ("[1]", "valid dictionary"),
    "a number": ("5", "valid dictionary"),
    "null": ("null", "valid dictionary"),
    "nothing to do": ({}, "give either messages or prompt"),
    "both": ({**PROMPT, "messages": [{"role": "user", "content": "x"}]}, "give either"),
    "no messages": ({"messages": []}, "messages: "),
    "an empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "unknown key": ({"promt": "x"}, "unknown key 'promt'; did you mean prompt"),
    "unknown sampling key": (
        {**PROMPT, "sampling": {"max_token": 5}},
        "unknown key 'max_token'; did you mean max_tokens",
    ),
    "unknown key in a message": (
        {"messages": [{"role": "user", "content": "x", "name": "bob"}]},
        "unknown key 'messages.0.name'",
    ),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
    "content of parts": (
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
        "messages.0.content: ",
    ),
    "sampling of another type": ({**PROMPT, "sampling": 5}, "sampling: "),
    "bad sampling": ({**PROMPT, "sampling": {"temperature": "hot"}}, "temperature: "),
    "infinite sampling": ({**PROMPT, "sampling": {"temperature": float("inf")}}, "temperature: "),
    "half a character": ('{"prompt": "\\ud800"}', "not valid Unicode"),
    "half a character in a message": (
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "not valid Unicode",
    ),
    "a number too long": ('{"prompt": "x", "id": ' + "9" * 5000 + "}", "not a line of JSON"),
    "too deep": ("[" * 100_000, "not a line of JSON"),
    "an id of another type": ({"id": {"a": 1}, **PROMPT}, "id"),
    "too long": ("x" * (MAX_LINE_CHARS + 1), "at most"),
    "too long for the model": ({"prompt": "wind " * 100}, "shorten the prompt"),
}


@pytest.mark.parametrize("name", BAD_LINES)
async def test_a_line_that_cannot_be_served_is_said_to_be_and_the_next_one_served(
    name: str,
) -> None:
    line, message = BAD_LINES[name]
    error, done = ends(await Speaker().serve(line, PROMPT))
    assert error["event"] == "error"
    assert error["kind"] == "RequestError"
    assert message in error["error"]
    assert len(error["error"]) < 300
    assert done["text"] == " comes from the north"


async def test_empty_lines_are_nothing() -> None:
    assert await Speaker().serve("\n", "  \n", "") == []


async def test_a_lost_cloud_is_an_error_and_the_next_line_tries_again() -> None:
    speaker = Speaker()
    speaker.model.failures = [ConnectionClosed("the cloud has gone")]
    error, done = ends(await speaker.serve({"id": 1, **PROMPT}, PROMPT))
    assert error == {
        "id": 1,
        "event": "error",
        "kind": "ConnectionClosed",
        "error": "the cloud has gone",
    }
    assert done["text"] == " comes from the north"
    assert len(speaker.model.sequences) == 2


async def test_over_a_real_model() -> None:
    service = LineService(fake_service(world().unsplit(), max_tokens=8))

    async def lines() -> AsyncIterator[str]:
        yield json.dumps(PROMPT)
        yield json.dumps({**PROMPT, "sampling": {"temperature": 1.5, "seed": 3, "top_p": 0.9}})

    events: list[Event] = []
    await service.run(lines(), events.append)
    assert [event["event"] for event in ends(events)] == ["done", "done"]
