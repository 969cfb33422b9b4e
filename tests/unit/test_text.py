"""Tokens become text when it is certain, and stop strings never show."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from privatelora.runtime.text import TextStream
from tests.partition.tiny import SPECIAL_TOKENS, tiny_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    backend: Tokenizer = tiny_tokenizer().backend_tokenizer
    return backend


def byte_fallback() -> Tokenizer:
    """As sentencepiece has it: words, and bytes for what is in no word."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁hello", "▁wor", "ld", "x", "é"]
    vocabulary = {word: i for i, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


def run(tokenizer: Tokenizer, token_ids: Sequence[int], *stop: str) -> tuple[list[str], TextStream]:
    """What each token gives, the flush last, and the stream afterwards."""
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token_id) for token_id in token_ids), stream.flush()], stream


def letters(text: str) -> list[int]:
    """Tokens of one byte each."""
    alphabet = byte_level().get_vocab()
    return [alphabet["Ġ" if letter == " " else letter] for letter in text]


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode("naïve 中🙂").ids
    pieces, _ = run(tokenizer, token_ids)
    assert "".join(pieces) == "naïve 中🙂"
    assert REPLACEMENT not in "".join(pieces)
    # One token per byte here: three bytes of 中 and four of 🙂 come at once.
    assert pieces[-8:] == ["", "", "中", "", "", "", "🙂", ""]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data())
def test_the_pieces_make_the_decoded_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = st.integers(0, tokenizer.get_vocab_size() - 1)
    token_ids = data.draw(st.lists(ids, max_size=40))
    pieces, stream = run(tokenizer, token_ids)
    decoded = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert not stream.stopped
    if REPLACEMENT not in decoded:
        assert "".join(pieces) == decoded


@settings(deadline=None)
@given(text=st.text(st.sampled_from("aé中🙂 x,\n"), max_size=30))
def test_text_survives(text: str) -> None:
    tokenizer = byte_level()
    pieces, _ = run(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text


def test_bytes_that_are_no_text_do_not_end_the_stream() -> None:
    tokenizer = byte_fallback()
    vocabulary = tokenizer.get_vocab()
    # An A, which with the byte behind it is no longer valid UTF-8, and a word.
    words = ["<0x41>", "<0x80>", "x", "▁hello", "ld"]
    token_ids = [vocabulary[word] for word in words]
    pieces, _ = run(tokenizer, token_ids)
    assert pieces[0] == "A"
    assert "".join(pieces).endswith("x hellold")


def test_special_tokens_and_unknown_ids_give_nothing() -> None:
    tokenizer = byte_level()
    special = [tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS]
    beyond = tokenizer.get_vocab_size() + 5  # models pad their vocabulary
    word = tokenizer.encode("wind").ids
    pieces, _ = run(tokenizer, [special[1], *word, special[2], beyond, *word, special[0]])
    assert "".join(pieces) == "windwind"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        pytest.param("one STOP two", ["STOP"], "one ", id="across tokens"),
        pytest.param("STOP two", ["STOP"], "", id="at the very start"),
        pytest.param("one two", ["STOP"], "one two", id="never"),
        pytest.param("aab", ["ab"], "a", id="the tail begins anew"),
        pytest.param("xababac", ["abac"], "xab", id="overlaps itself"),
        pytest.param("one two three", ["three", "two"], "one ", id="the earlier of several"),
        pytest.param("abcd", ["bcd", "c"], "ab", id="the one that is complete first"),
        pytest.param("one STO", ["STOP"], "one STO", id="only its beginning, at the end"),
        pytest.param("one STOx", ["STOP"], "one STOx", id="only its beginning, in the middle"),
        pytest.param("a", ["a"], "", id="a single letter"),
        pytest.param("ab", ["", "b"], "a", id="an empty one means nothing"),
    ],
)
def test_stop_strings(text: str, stop: list[str], expected: str) -> None:
    pieces, stream = run(byte_level(), letters(text), *stop)
    assert "".join(pieces) == expected
    assert stream.stopped == (expected != text)


def test_nothing_follows_a_stop_string() -> None:
    stream = TextStream(byte_level(), ["n"])
    assert [stream.push(token) for token in letters("one two")] == ["o", *[""] * 6]
    assert stream.stopped
    assert stream.flush() == ""


def test_a_stop_string_of_several_bytes_a_character() -> None:
    tokenizer = byte_level()
    pieces, stream = run(tokenizer, tokenizer.encode("a🙂 中🙂b").ids, "中🙂")
    assert "".join(pieces) == "a🙂 "
    assert stream.stopped


def test_a_stop_string_inside_one_token() -> None:
    tokenizer = byte_level()
    (token_id,) = [i for word, i in tokenizer.get_vocab().items() if word == "Ġth"]
    pieces, stream = run(tokenizer, [*letters("a"), token_id], "t")
    assert "".join(pieces) == "a "
    assert stream.stopped


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(byte_level(), ["STOP", "TOx"])
    pushed = [stream.push(token_id) for token_id in letters("aSTOy ST")]
    assert pushed == ["a", "", "", "", "STOy", " ", "", ""]
    assert stream.flush() == "ST"
    assert stream.flush() == ""


@settings(deadline=None)
@given(
    text=st.text(st.sampled_from("ab"), max_size=25),
    stop=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), max_size=3),
)
def test_no_stop_string_shows_and_nothing_else_is_lost(text: str, stop: list[str]) -> None:
    pieces, stream = run(byte_level(), letters(text), *stop)
    shown = "".join(pieces)
    # As soon as any is complete: the shortest beginning of the text that holds one.
    ends = [end for end in range(len(text) + 1) if any(s in text[:end] for s in stop)]
    if ends:
        held = text[: ends[0]]
        assert shown == held[: min(held.find(s) for s in stop if s in held)]
    else:
        assert shown == text
    assert stream.stopped == bool(ends)
