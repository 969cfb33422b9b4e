"""``privatelora chat`` without a terminal: the conversation, its commands and its files."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from privatelora.cli._chat_commands import COMMANDS, candidates, take
from privatelora.cli._chat_conversation import ChatConversation
from privatelora.cli.chat import talk
from privatelora.errors import CapacityError, ConfigError, RequestError
from privatelora.runtime.generation import GenerationStats
from tests.unit.fakes import FakeModel, fake_service

LETTER = 40
"""A token of text in the tiny vocabulary."""


class Talker:
    """A conversation with two models, of which "0" counts up and "1" repeats itself."""

    def __init__(self) -> None:
        self.models = [FakeModel(max_positions=200), FakeModel(lambda ids: LETTER, 200)]
        self.service = fake_service(*self.models, max_tokens=3)
        self.chat = ChatConversation(self.service)

    async def say(self, line: str) -> str:
        """The answer, or what the command shows."""
        outcome = await take(self.chat, line)
        if outcome.to_answer is None:
            return outcome.text
        pieces: list[str] = []
        await self.chat.answer(outcome.to_answer, pieces.append, GenerationStats())
        return "".join(pieces)

    @property
    def turns(self) -> list[tuple[str, str]]:
        return [(message["role"], message["content"]) for message in self.chat.messages]


@pytest.fixture
async def talker() -> AsyncGenerator[Talker, None]:
    made = Talker()
    yield made
    await made.service.aclose()


async def test_turns_are_kept_and_go_on(talker: Talker) -> None:
    first = await talker.say("Hi")
    second = await talker.say("And?")
    assert first
    expected = [("user", "Hi"), ("assistant", first), ("user", "And?"), ("assistant", second)]
    assert talker.turns == expected


async def test_another_model_goes_on_with_the_same_text(talker: Talker) -> None:
    first = await talker.say("Hi")
    assert await talker.say("/model") == "* 0\n  1"
    assert await talker.say("/model 1") == "1 answers from now on"
    assert await talker.say("/model") == "  0\n* 1"
    second = await talker.say("And?")
    assert second == talker.service.text("1").decode([LETTER] * 3)
    assert talker.turns[:2] == [("user", "Hi"), ("assistant", first)]
    [sequence] = talker.models[1].sequences
    assert len(sequence.cached) > len(talker.service.text("1").encode_prompt(f"Hi{first}And?"))
    with pytest.raises(RequestError, match="there is no model '2' here; choose from 0, 1"):
        await talker.say("/model 2")
    assert talker.chat.model == "1"


async def test_a_message_is_answered_again(talker: Talker) -> None:
    with pytest.raises(RequestError, match="nothing was asked yet"):
        await talker.say("/retry")
    await talker.say("Hi")
    talker.chat.switch("1")
    again = await talker.say("/retry")
    assert talker.turns == [("user", "Hi"), ("assistant", again)]
    assert again == talker.service.text("1").decode([LETTER] * 3)


async def test_an_answer_that_failed_leaves_all_as_it_was_and_can_be_tried_again(
    talker: Talker,
) -> None:
    answer = await talker.say("Hi")
    talker.models[0].failures = [CapacityError("full")]
    with pytest.raises(CapacityError):
        await talker.say("And?")
    assert talker.turns == [("user", "Hi"), ("assistant", answer)]
    again = await talker.say("/retry")
    assert talker.turns[2:] == [("user", "And?"), ("assistant", again)]
    talker.models[0].failures = [CapacityError("full")]
    with pytest.raises(CapacityError):
        await talker.say("/retry")
    assert talker.turns[2:] == [("user", "And?"), ("assistant", again)]


async def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(talker: Talker) -> None:
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            answering.cancel()

    talker.chat.switch("1")
    talker.chat.set_sampling("max_tokens", 50)
    asked = talker.chat.asking("Hi")
    answering = asyncio.create_task(talker.chat.answer(asked, show, GenerationStats()))
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert len(pieces) == 2
    assert talker.turns == [("user", "Hi"), ("assistant", "".join(pieces))]
    status = await talker.service.status()
    assert (status.open_conversations, status.busy_conversations) == (0, 0)
    assert await talker.say("And?")


async def test_turns_are_forgotten(talker: Talker) -> None:
    first = await talker.say("Hi")
    await talker.say("And this,\nover two lines?")
    assert await talker.say("/undo") == "forgotten: And this, over two lines?"
    assert talker.turns == [("user", "Hi"), ("assistant", first)]
    assert await talker.say("/new") == "a new conversation"
    assert talker.turns == []
    for command in ("/undo", "/retry"):
        with pytest.raises(RequestError, match="nothing was asked yet"):
            await talker.say(command)


async def test_the_system_prompt_goes_before_everything(talker: Talker) -> None:
    assert await talker.say("/system") == "system prompt: none"
    assert await talker.say("/system Be brief.\nPlease.") == "system prompt: Be brief.\nPlease."
    await talker.say("Hi")
    messages = talker.chat.with_system_prompt(talker.chat.messages[:1])
    assert [message["role"] for message in messages] == ["system", "user"]
    prompt_ids = talker.service.text().encode_chat(messages)
    ran = [token for tokens, _, _ in talker.models[0].steps for token in tokens]
    assert ran[: len(prompt_ids)] == prompt_ids
    assert await talker.say("/new") == "a new conversation"
    assert talker.chat.system_prompt == "Be brief.\nPlease."
    await talker.say("/system none")
    assert talker.chat.with_system_prompt([]) == []


async def test_sampling_is_set_shown_and_reset(talker: Talker) -> None:
    assert await talker.say("/set temperature 0.7") == "temperature: 0.7"
    assert await talker.say('/set stop ["END", "\\n"]') == 'stop: ["END", "\\n"]'
    assert await talker.say("/set seed null") == "seed: null"
    shown = await talker.say("/set")
    assert "temperature" in shown.splitlines()[0]
    assert "0.7" in shown.splitlines()[0]
    assert talker.chat.params.temperature == 0.7
    assert await talker.say("/set temperature default") == "temperature: 0.0"
    assert await talker.say("/set max_tokens 1") == "max_tokens: 1"
    talker.chat.switch("1")
    assert await talker.say("Hi") == talker.service.text("1").decode([LETTER])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/modle 1", "there is no command '/modle'; did you mean /model?"),
        ("/etc/passwd is what?", "'/etc/passwd'; /help lists them (a message that begins with /"),
        ("/save", "/save needs more: /save FILE"),
        ("/new one", "/new stands alone; 'one' is too much"),
        ("/set temperature", "/set temperature needs a value; default is the edge's own"),
        ("/set temperature -1", "sampling: temperature: Input should be greater than or equal"),
        ("/set temperature warm", "sampling: temperature: Input should be a valid number"),
        ("/set top_n 3", "sampling: unknown key 'top_n'; did you mean top_p or top_k?"),
        ("/set top_n default", "there is no setting 'top_n'; /set lists them"),
        ("/set max_tokens " + "9" * 5000, "sampling: max_tokens: "),
    ],
)
async def test_a_wrong_command_is_one_clear_line(talker: Talker, line: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        await talker.say(line)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (talker.turns, talker.chat.params) == ([], talker.service.defaults)


async def test_two_slashes_begin_a_message(talker: Talker) -> None:
    await talker.say("//etc/passwd is what?")
    assert talker.turns[0] == ("user", "/etc/passwd is what?")


async def test_help_names_every_command(talker: Talker) -> None:
    lines = (await talker.say("/help")).splitlines()
    assert [line.split()[0] for line in lines[: len(COMMANDS)]] == list(COMMANDS)
    assert (await take(talker.chat, "/quit")).is_over


async def test_status_says_how_it_stands(talker: Talker) -> None:
    text = await talker.say("/status")
    fields = dict(line.split("  ", 1) for line in text.splitlines())
    assert fields["cloud"].strip() == "inproc://fake"
    assert fields["round trip"].strip() == "1.00 ms"
    assert fields["model"].strip() == "0"


async def test_a_conversation_is_saved_and_loaded(talker: Talker, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    await talker.say("/system Be brief.")
    await talker.say("Grüße")
    turns = talker.turns
    assert await talker.say(f"/save {file}") == f"3 messages written to {file}"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved[:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße"},
    ]
    await talker.say("/system none")
    await talker.say("/new")
    assert await talker.say(f"/load {file}") == f"3 messages read from {file}"
    assert (talker.turns, talker.chat.system_prompt) == (turns, "Be brief.")
    file.write_text(json.dumps(saved[1:2]))
    await talker.say(f"/load {file}")
    assert talker.chat.system_prompt is None  # as the edge's settings say
    await talker.say("/retry")
    assert [role for role, _ in talker.turns] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[", "expected a JSON list of objects with role and content"),
        (b"[" * 100_000, "expected a JSON list of objects"),
        (b'{"messages": []}', "expected a JSON list"),
        (b'[{"role": "tool", "content": "a"}]', "0.role: Input should be"),
        (b'[{"role": "user", "content": 1}]', "0.content: Input should be"),
        (b'[{"role": "user", "content": "a", "name": "b"}]', "Extra inputs"),
        (b'[{"role": "user", "content": "\xff"}]', "expected a JSON list"),
        (None, "No such file or directory"),
    ],
)
async def test_a_bad_file_changes_nothing(
    talker: Talker, tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "talk.json"
    if content is not None:
        file.write_bytes(content)
    await talker.say("Hi")
    turns = talker.turns
    with pytest.raises(ConfigError, match=said) as caught:
        await talker.say(f"/load {file}")
    assert str(file) in str(caught.value)
    assert talker.turns == turns


async def test_files_that_cannot_be(talker: Talker, tmp_path: Path) -> None:
    for line, said in (
        (f"/load {tmp_path}", "it is not a file"),
        (f"/save {tmp_path}", "Is a directory"),
        (f"/save {tmp_path}/a/b", "No such file or directory"),
        ("/save a\0b", "null"),
        ("/load a\0b", "null"),
    ):
        with pytest.raises(ConfigError, match=said):
            await talker.say(line)


async def test_completion_knows_commands_models_and_settings(talker: Talker) -> None:
    def of(text: str) -> list[str]:
        return candidates(talker.chat, text)

    assert of("/s") == ["/system", "/set", "/save", "/status"]
    assert of("/model ") == ["0", "1"]
    assert of("/set top_") == ["top_k", "top_p"]
    for text in ("", "s", "/set top_k ", "/system /s", "/s\n/s", "Hi /s"):
        assert of(text) == []


async def test_errors_do_not_end_a_talk(talker: Talker, capsys: pytest.CaptureFixture[str]) -> None:
    talker.models[0].failures = [CapacityError("the cloud\nis full")]

    async def lines() -> AsyncGenerator[str, None]:
        for line in ("Hi\n", "\n", "/nonsense", "/retry", "/quit", "not read"):
            yield line

    await talk(talker.chat, lines())
    seen = capsys.readouterr()
    first, second, figures = seen.err.splitlines()
    assert first == "error: the cloud is full"
    assert second.startswith("error: there is no command '/nonsense'")
    assert "3 tokens · first after" in figures
    assert seen.out == talker.chat.messages[1]["content"] + "\n"
    assert len(talker.turns) == 2
