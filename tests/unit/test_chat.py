"""Conversations in words: what a chat template makes of them, and tokens as text and bytes."""

from __future__ import annotations

import pytest

from privatelora.errors import RequestError
from privatelora.runtime.chat import TextModel
from tests.partition.tiny import tiny_tokenizer
from tests.unit.fakes import FakeModel


def test_the_chat_template_writes_the_special_tokens() -> None:
    text = TextModel(FakeModel(), tiny_tokenizer())
    prompt = text.encode_chat([{"role": "user", "content": "how many"}])
    decoded = tiny_tokenizer().decode(prompt)
    assert decoded == "<|start|>user\nhow many<|end|>\n<|start|>assistant\n"
    assert prompt[0] == tiny_tokenizer().bos_token_id


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{% for x in %}",
    ],
)
def test_a_chat_template_that_refuses(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text = TextModel(FakeModel(), tokenizer)
    with pytest.raises(RequestError, match="chat template"):
        text.encode_chat([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}])


def test_no_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        TextModel(FakeModel(), tokenizer).encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("words", ["The wind comes", " naïve — 東京 🙂\n", "<b> \n\n"])
def test_the_bytes_of_its_tokens_are_those_of_a_text(words: str) -> None:
    text = TextModel(FakeModel(), tiny_tokenizer())
    token_ids = text.encode_prompt(words, add_special_tokens=False)
    assert b"".join(map(text.token_bytes, token_ids)) == words.encode()
    assert text.decode(token_ids) == words


def test_special_tokens_stand_for_their_names() -> None:
    tokenizer = tiny_tokenizer()
    text = TextModel(FakeModel(), tokenizer)
    assert text.token_text(tokenizer.bos_token_id) == tokenizer.bos_token
    assert text.token_bytes(tokenizer.bos_token_id) == tokenizer.bos_token.encode()
