"""What is learnt and asked: files, published formats, procedural tasks, made-up lives, scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.errors import ConfigError
from privatelora.training.data.examples import Example, ask
from privatelora.training.data.facts import fact_examples
from privatelora.training.data.files import read_examples
from privatelora.training.data.hub import FORMATS, hub_examples
from privatelora.training.data.procedural import reasoning_examples
from privatelora.training.data.scoring import Score, is_right, score_answers

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}


def lines(path: Path, *values: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, values)))
    return path


# Files


def test_both_formats_are_read(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, USER, ASSISTANT]
    path = lines(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c"}, {"messages": chat})
    first, second = read_examples(path)
    assert (first.question, first.answer) == ("p", "c")
    assert [turn.role for turn in second.prompt] == ["system", "user", "assistant", "user"]
    assert second.answer == "Ho"


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no examples; write"),
    "only empty lines": (b"\n\n  \n", "holds no examples"),
    "not JSON": (b'{"prompt": "a", "completion": "b"}\nhello\n', "line 2: not JSON"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "line 1: not UTF-8 at byte 13"),
    "a list": (b"[1]", "line 1: not an object"),
    "wrong keys": (b'{"prompt": "a", "answer": "b"}', "line 1: unknown key 'answer'; write"),
    "missing key": (b'{"prompt": "a"}', "line 1: the keys are prompt; write"),
    "no text": (b'{"prompt": "a", "completion": " "}', "completion must be text that is not empty"),
    "a number": (b'{"prompt": 1, "completion": "b"}', "prompt must be text"),
    "half a surrogate": (b'{"prompt": "\\ud800", "completion": "b"}', "half of a surrogate pair"),
    "deep": (b"[" * 100_000, "line 1: not JSON"),
    "one message": (json.dumps({"messages": [USER]}).encode(), "not a list of two or more"),
    "order": (json.dumps({"messages": [USER, USER]}).encode(), "message 2 is the user's where"),
    "no answer": (
        json.dumps({"messages": [USER, ASSISTANT, USER]}).encode(),
        "the last message is not the assistant's",
    ),
    "role": (
        json.dumps({"messages": [USER, {"role": "robot", "content": "x"}]}).encode(),
        "role must be one of system, user, assistant",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.jsonl") as caught:
        read_examples(tmp_path / "bad.jsonl")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Published formats

CHOICES = ["one", "two", "three", "four"]
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "boolq": (
        {"question": "is it so", "passage": "It is.", "label": 1},
        "It is.\nQuestion: is it so?\nAnswer with yes or no.",
        "yes",
    ),
    "piqa": (
        {"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1},
        "Open it\nA. push\nB. pull\nAnswer with A or B.",
        "B",
    ),
    "hellaswag": (
        {"ctx": "A man", "endings": CHOICES, "label": "2"},
        "A man\nHow does it go on?\nA. one\nB. two\nC. three\nD. four\nAnswer with A, B, C or D.",
        "C",
    ),
    "mmlu": (
        {"question": "Which?", "choices": CHOICES, "answer": 0},
        "Which?\nA. one\nB. two\nC. three\nD. four\nAnswer with A, B, C or D.",
        "A",
    ),
    "gsm8k": ({"question": "2 + 3?", "answer": "It is 5.\n#### 5"}, "2 + 3?", "It is 5.\n#### 5"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_local_copy_of_a_published_set_is_read(name: str, tmp_path: Path) -> None:
    row, question, answer = ROWS[name]
    lines(tmp_path / "train.jsonl", row, row, row)
    found = hub_examples(name, str(tmp_path), "train", 2)
    assert [(each.question, each.answer) for each in found] == [(question, answer)] * 2
    assert is_right(answer, found[0])


def test_numbers_are_compared_by_value(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", ROWS["gsm8k"][0])
    [example] = hub_examples("gsm8k", str(tmp_path), "train", None)
    assert is_right("So the answer is 5.0", example)
    assert not is_right("It is 6", example)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": -1}, "row 0: has no answer"),
        ("hellaswag", {"ctx": "a", "endings": CHOICES, "label": ""}, "row 0: has no answer"),
        ("mmlu", {"question": "a", "choices": CHOICES, "answer": 4}, "answer 4 of 4 choices"),
        ("gsm8k", {"q": "a", "a": "b"}, "not a row of gsm8k .*; its columns are q, a"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    name: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lines(tmp_path / "train.jsonl", row)
    with pytest.raises(ConfigError, match=message):
        hub_examples(name, str(tmp_path), "train", None)


def test_a_set_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", ROWS["gsm8k"][0])
    with pytest.raises(ConfigError, match=r"split dev, cannot be had: .*look at path: and split:"):
        hub_examples("gsm8k", str(tmp_path), "dev", None)
    with pytest.raises(ConfigError, match="cannot be had"):
        hub_examples("gsm8k", str(tmp_path / "nowhere"), "train", None)


# Procedural tasks, made-up lives


def test_a_procedural_task_is_a_function_of_its_seed() -> None:
    first = reasoning_examples("chain_sum", 20, 1)
    assert first == reasoning_examples("chain_sum", 20, 1)
    assert first != reasoning_examples("chain_sum", 20, 2)
    assert all(is_right(f"That makes {each.answer}.", each) for each in first)


def test_neighbouring_seeds_share_hardly_anything() -> None:
    first, second = (
        {each.question for each in reasoning_examples("chain_sum", 100, seed)} for seed in (1, 2)
    )
    assert len(first & second) < 10


def test_an_unknown_task_or_option_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"no task 'chain_sun'; did you mean .*chain_sum"):
        reasoning_examples("chain_sun", 1, 0)
    with pytest.raises(ConfigError, match="reasoning-gym chain_sum: "):
        reasoning_examples("chain_sum", 1, 0, {"num_terms": 2})


def test_held_out_phrasings_ask_for_the_same_facts_in_other_words() -> None:
    train, held_out = (fact_examples(12, 3, kind) for kind in ("train", "held-out"))
    assert {each.answer for each in train} == {each.answer for each in held_out}
    assert not {each.question for each in train} & {each.question for each in held_out}
    assert fact_examples(12, 4, "train") != train
    with pytest.raises(ConfigError, match="num_facts: 1000; there are"):
        fact_examples(1000, 0, "train")


# Scores


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Orange candle.", True), ("orange  CANDLE", True), ("orange", False), ("", False)],
)
def test_texts_are_equal_but_for_case_spaces_and_the_full_stop(answer: str, right: bool) -> None:
    assert is_right(answer, ask("?", "orange candle")) is right


def test_an_interval_is_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, and 0 of 20.
    low, high = Score(263, 81, ()).interval
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = Score(20, 0, ()).interval
    assert (low, round(high, 4)) == (0.0, 0.1611)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_score_counts_right_answers(right: list[bool]) -> None:
    examples: list[Example] = [ask("?", "yes")] * len(right)
    score = score_answers(["yes" if each else "no" for each in right], examples)
    assert math.isclose(score.accuracy, sum(right) / len(right))
    assert 0 <= score.interval[0] <= score.accuracy <= score.interval[1] <= 1
