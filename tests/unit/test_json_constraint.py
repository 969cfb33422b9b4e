"""Answers that have to be JSON: what may come next, and schemas that cannot be followed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from privatelora.errors import RequestError
from privatelora.runtime.json_constraint import JsonConstraint
from privatelora.runtime.sampler import Sampler
from privatelora.runtime.sampling_params import SamplingParams
from tests.partition.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = 2
VOCAB_SIZE = 220
"""Models may have more rows than their tokenizer has tokens."""


def constraint(schema: dict[str, Any]) -> JsonConstraint:
    return JsonConstraint(schema, TOKENIZER.backend_tokenizer, VOCAB_SIZE, (EOS,))


def allowed_after(schema: dict[str, Any], text: str) -> set[str]:
    following = constraint(schema)
    for token_id in TOKENIZER.encode(text):
        assert not following.forbidden()[token_id], TOKENIZER.decode([token_id])
        following.accept(token_id)
    forbidden = following.forbidden()
    assert forbidden.shape == (VOCAB_SIZE,)
    assert forbidden[len(TOKENIZER) :].all()
    return {TOKENIZER.decode([int(i)]) for i in torch.nonzero(~forbidden)[:, 0]}


def test_only_what_can_become_the_document() -> None:
    assert allowed_after({"const": 5}, "") == {"5"}
    assert allowed_after({"const": 5}, "5") == {"<|end|>"}
    assert "{" in allowed_after({"type": "object"}, "")
    assert "[" not in allowed_after({"type": "object"}, "")


def test_white_space_has_an_end() -> None:
    assert " " in allowed_after({"type": "object"}, "{" + " " * 31)
    assert " " not in allowed_after({"type": "object"}, "{" + " " * 32)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sampler_writes_the_document_and_ends(temperature: float) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["red", "green"]}, "sizes": {"type": "array"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    params = SamplingParams(temperature=temperature, seed=3, top_p=0.9, repetition_penalty=1.2)
    sampler = Sampler(params, 1, (), constraint(schema))
    generator = torch.Generator().manual_seed(1)
    token_ids = [7]
    # Without a wish of its own the model would go on for long; it prefers what ends things.
    ends = [TOKENIZER.convert_tokens_to_ids(mark) for mark in ('"', "}", "]")]
    while token_ids[-1] != EOS:
        logits = torch.randn(VOCAB_SIZE, generator=generator)
        logits[[*ends, EOS]] += 4
        token_ids.append(sampler.choose(logits, token_ids))
        assert len(token_ids) < 2000
    written = json.loads(TOKENIZER.decode(token_ids[1:-1]))
    assert written["name"] in ("red", "green")


DEEP: dict[str, Any] = {}
for _ in range(5000):
    DEEP = {"properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "banana"}, "Invalid type: banana"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "http://127.0.0.1/schema"}, "does not fetch resources"),
        ({"type": "string", "pattern": "(?<=a)b"}, "look-around"),
        ({"const": "\ud800"}, ""),
        ({"const": float("nan")}, "holds what JSON has no form for"),
        (DEEP, "nested too deeply"),
    ],
    ids=["type", "not", "ref", "pattern", "surrogate", "nan", "deep"],
)
def test_schemas_that_cannot_be_followed(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        constraint(schema)
    assert str(caught.value).startswith("json_schema: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
