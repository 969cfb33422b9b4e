"""General prompts, the base model's answers to them, their file, and batches of two kinds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler

from privatelora.errors import ConfigError, PartitionError
from privatelora.training.mixing import MixedSampler
from privatelora.training.replay import (
    GeneralAnswer,
    cached_general,
    encode_general,
    generate_general,
    prompt_ids,
    read_prompts,
    stop_ids,
)
from tests.partition.tiny import tiny_model, tiny_tokenizer

PROMPTS = ("How are you?", "Name a river in the north.", "apples", "Why does the wind blow?")


class OnlyForward(torch.nn.Module):
    """A model with nothing but the calling convention of training."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def ask(model: Any, tokenizer: Any, **options: Any) -> list[GeneralAnswer]:
    return generate_general(
        model, tokenizer, PROMPTS, **{"max_new_tokens": 12, "batch_size": 3, **options}
    )


def test_packaged_prompts_are_many_and_never_twice() -> None:
    replay, held_out = read_prompts()
    assert (len(replay), len(held_out)) == (240, 80)
    assert len({*replay, *held_out}) == 320


def test_every_fourth_prompt_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n\n three \nfour\r\nfive\n")
    replay, held_out = read_prompts(file)
    assert replay == ("one", "two", "three", "five")
    assert held_out == ("four",)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"one\ntwo\nthree\n", "3 prompts"), (b"\xff\n" * 9, "not UTF-8"), (None, "cannot read")],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prompts(file)
    assert str(file) in str(caught.value)


def test_greedy_answers_are_the_models_own(model: Any, tokenizer: Any) -> None:
    answers = ask(model, tokenizer, temperature=0.0)
    assert [answer.prompt for answer in answers] == list(PROMPTS)
    for row, answer in zip(encode_general(answers, tokenizer), answers, strict=True):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            best = model(input_ids=ids).logits[0].argmax(-1)
        assert row.input_ids[-row.num_answer :] == answer.token_ids
        assert best[-row.num_answer - 1 : -1].tolist() == list(answer.token_ids)
        assert answer.answer == tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_a_model_without_generate_answers_the_same(model: Any, tokenizer: Any) -> None:
    wanted = ask(model, tokenizer, temperature=0.0)
    assert ask(OnlyForward(model), tokenizer, temperature=0.0) == wanted


@pytest.mark.parametrize("wrapper", [lambda model: model, OnlyForward])
def test_an_answer_ends_where_the_model_ends_it(tokenizer: Any, wrapper: Any) -> None:
    eager = tiny_model("llama", seed=3)
    eos = tokenizer.eos_token_id
    with torch.no_grad():  # three times the logit of any other token, of either sign
        eager.lm_head.weight[eos] = eager.lm_head.weight.abs().amax() * torch.sign(
            eager.lm_head.weight[eos]
        )
    answers = ask(wrapper(eager), tokenizer, max_new_tokens=40)
    ended = [answer.token_ids[-1] == eos for answer in answers]
    assert any(ended)
    for answer in answers:
        assert eos not in answer.token_ids[:-1]
        assert answer.token_ids[-1] == eos or len(answer.token_ids) == 40


def test_sampling_follows_the_models_distribution(tokenizer: Any) -> None:
    flat = tiny_model("llama")
    with torch.no_grad():
        flat.lm_head.weight *= 0.4
    prompts = ["apples"] * 400
    for model in (flat, OnlyForward(flat)):
        answers = generate_general(model, tokenizer, prompts, max_new_tokens=1, batch_size=400)
        ids = torch.tensor([prompt_ids(tokenizer, "apples")])
        with torch.no_grad():
            probs = torch.softmax(flat(input_ids=ids).logits[0, -1], -1)
        likely = probs.topk(20).indices
        share = sum(answer.token_ids[0] in likely for answer in answers) / len(answers)
        assert 0.2 < float(probs[likely].sum()) < 0.8
        assert share == pytest.approx(float(probs[likely].sum()), abs=0.1)


def test_seeds_decide_and_nothing_else_is_touched(model: Any, tokenizer: Any) -> None:
    model.train()
    state = torch.random.get_rng_state()
    first, again = ask(model, tokenizer, seed=1), ask(model, tokenizer, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    model.eval()
    assert first == again != ask(model, tokenizer, seed=2)


def test_stops_of_configuration_and_tokenizer(model: Any, tokenizer: Any) -> None:
    assert stop_ids(model, tokenizer) == (2,)
    assert stop_ids(OnlyForward(tiny_model("llama", eos_token_id=[7, 5])), tokenizer) == (2, 5, 7)


def test_without_a_template_a_prompt_is_a_line(tokenizer: Any) -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None
    assert plain.decode(prompt_ids(plain, "apples")).endswith("apples\n")
    assert len(prompt_ids(tokenizer, "apples")) > len(prompt_ids(plain, "apples"))


class TestCache:
    def ask(self, directory: Path, model: Any, tokenizer: Any, **options: Any) -> Any:
        calls: list[tuple[int, int]] = []
        answers = cached_general(
            model,
            tokenizer,
            options.pop("prompts", PROMPTS),
            cache=directory,
            model_fingerprint=options.pop("model_fingerprint", "ab" * 32),
            max_new_tokens=6,
            progress=lambda done, total: calls.append((done, total)),
            **options,
        )
        return answers, bool(calls)

    def test_a_file_is_written_once_and_read_again(
        self, tmp_path: Path, model: Any, tokenizer: Any
    ) -> None:
        first, asked = self.ask(tmp_path, model, tokenizer)
        assert asked
        again, asked = self.ask(tmp_path, model, tokenizer)
        assert not asked
        assert again == first
        (file,) = tmp_path.iterdir()
        lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
        assert lines[0]["model_fingerprint"] == "ab" * 32
        assert [line["prompt"] for line in lines[1:]] == list(PROMPTS)
        assert [line["answer"] for line in lines[1:]] == [answer.answer for answer in first]

    @pytest.mark.parametrize(
        "options",
        [{"seed": 9}, {"temperature": 0.5}, {"model_fingerprint": "cd"}, {"prompts": ["apples"]}],
        ids=lambda options: next(iter(options)),
    )
    def test_anything_else_has_a_file_of_its_own(
        self, tmp_path: Path, model: Any, tokenizer: Any, options: Any
    ) -> None:
        self.ask(tmp_path, model, tokenizer)
        _, asked = self.ask(tmp_path, model, tokenizer, **options)
        assert asked
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1],
            lambda data: data.replace(b"river", b"brook"),
            lambda data: b"\xff" + data,
            lambda data: b"[" * 100_000,
        ],
        ids=["empty", "half", "last byte", "other prompt", "not text", "deep"],
    )
    def test_a_damaged_file_is_made_again(
        self, tmp_path: Path, model: Any, tokenizer: Any, damage: Any
    ) -> None:
        first, _ = self.ask(tmp_path, model, tokenizer)
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        again, asked = self.ask(tmp_path, model, tokenizer)
        assert asked
        assert again == first
        assert file.read_bytes() == whole

    def test_a_folder_that_is_not_there(self, tmp_path: Path, model: Any, tokenizer: Any) -> None:
        with pytest.raises(PartitionError, match="cannot write"):
            self.ask(tmp_path / "missing", model, tokenizer)


def batches(sampler: MixedSampler, size: int) -> list[list[int]]:
    return list(BatchSampler(sampler, size, drop_last=False))


@pytest.mark.parametrize(
    ("size", "share", "general"),
    [(8, 0.25, 2), (8, 0.01, 1), (8, 0.99, 7), (2, 0.5, 1), (5, 0.5, 2)],
)
def test_every_batch_has_its_share(size: int, share: float, general: int) -> None:
    sampler = MixedSampler(19, 7, batch_size=size, share=share, seed=0)
    found = batches(sampler, size)
    assert sum(map(len, found)) == len(sampler) == sampler.num_batches * size
    for batch in found:
        assert sum(index >= 19 for index in batch) == general
        assert all(0 <= index < 26 for index in batch)


def test_an_epoch_shows_every_task_example_and_goes_round_the_general_ones() -> None:
    sampler = MixedSampler(18, 7, batch_size=8, share=0.25, seed=0)
    counts: Counter[int] = Counter()
    for epoch in range(7):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(index for index in order if index < 18) == list(range(18))
        counts.update(index for index in order if index >= 18)
    assert set(counts.values()) == {6}  # 7 epochs of 3 batches of 2 over 7 examples


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(epoch: int, seed: int = 0) -> list[int]:
        sampler = MixedSampler(50, 20, batch_size=4, share=0.25, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(3) == order(3)
    assert len({tuple(order(0)), tuple(order(1)), tuple(order(0, seed=1))}) == 3


def test_a_batch_too_small_for_two_kinds() -> None:
    with pytest.raises(ConfigError, match="batch size of at least 2"):
        MixedSampler(5, 5, batch_size=1, share=0.25, seed=0)
    with pytest.raises(ConfigError, match="0 task examples"):
        MixedSampler(0, 5, batch_size=4, share=0.25, seed=0)
