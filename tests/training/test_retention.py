"""What is kept of the base model: the term that holds training back, and its measure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from privatelora.errors import ConfigError
from privatelora.training import retention
from privatelora.training.data.collate import collate
from privatelora.training.data.examples import Encoded
from privatelora.training.general import prepare_retention
from privatelora.training.retention import (
    RetentionConfig,
    build_reference,
    final_hidden_states,
    kl_to_reference,
    measure_retention,
)
from tests.partition.tiny import tiny_model, tiny_tokenizer

SHAPES = ((9, 4), (17, 6), (5, 1), (30, 12), (12, 11))
"""Tokens of an example, and of its answer."""


class OwnStates(torch.nn.Module):
    """A model as split training has it: no transformers model, but states for the asking."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.lm_head = inner.lm_head.weight.detach()

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        output = self.inner.model(input_ids=input_ids, attention_mask=attention_mask)
        states: Tensor = output.last_hidden_state[:, -keep:]
        return states

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Any:
        states = self.hidden_states(input_ids, attention_mask, logits_to_keep)
        return SimpleNamespace(logits=F.linear(states, self.lm_head))


def with_peft(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


WRAPPERS = {"plain": lambda model: model, "peft": with_peft, "own states": OwnStates}


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Any:
    return WRAPPERS[request.param]


def rows(seed: int = 0) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(tuple(torch.randint(3, 199, (n,), generator=generator).tolist()), answer)
        for n, answer in SHAPES
    ]


def collated(examples: list[Encoded], more: int = 0) -> dict[str, Any]:
    """A batch, ``more`` positions kept than are needed."""
    batch = collate(examples, pad_token_id=0)
    batch["logits_to_keep"] += more
    return batch


def logits_of(model: Any, batch: dict[str, Any]) -> Tensor:
    names = ("input_ids", "attention_mask", "logits_to_keep")
    logits: Tensor = model(**{name: batch[name] for name in names}).logits
    return logits


def direct(base: Any, trained: Any, examples: list[Encoded]) -> tuple[Tensor, float]:
    """Mean KL and agreement of two models, each row alone and without padding."""
    kl, agreed = [], []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        answer = slice(-example.num_answer - 1, -1)
        p, q = (
            torch.log_softmax(model(input_ids=ids).logits[0, answer].double(), -1)
            for model in (base, trained)
        )
        kl.append(F.kl_div(q, p.detach(), log_target=True, reduction="none").sum(-1))
        agreed.append((p.argmax(-1) == q.argmax(-1)).double())
    return torch.cat(kl).mean(), float(torch.cat(agreed).mean())


def changed(model: Any, std: float, seed: int = 7) -> Any:
    """Add noise to the layers of a model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_an_untouched_model_is_its_base(family: str, wrap: Any) -> None:
    model = wrap(tiny_model(family))
    reference = build_reference(model, rows(), batch_size=2)
    batch = collated(list(reference.examples))
    kl = kl_to_reference(logits_of(model, batch), batch, reference)
    assert kl is not None
    assert abs(kl.item()) < 1e-6
    found = measure_retention(model, reference, batch_size=3)
    assert (found.agreement, found.agreement_low, found.agreement_high) == (1.0, 1.0, 1.0)
    assert abs(found.kl) < 1e-6
    assert (found.num_prompts, found.num_positions) == (5, 34)


def test_divergence_is_that_of_two_models(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "CHUNK_NUMEL", 3 * 199)  # several chunks, the last one short
    model = tiny_model("llama")
    wrapped = wrap(model)
    reference = build_reference(wrapped, rows())
    changed(model.model, 0.03)
    wanted, agreement = direct(tiny_model("llama"), wrapped_logits(wrapped), rows())
    batch = collated(list(reference.examples), more=3)
    kl = kl_to_reference(logits_of(wrapped, batch), batch, reference)
    assert kl is not None
    assert wanted.item() > 0.01
    assert kl.item() == pytest.approx(wanted.item(), rel=1e-4)
    found = measure_retention(wrapped, reference, batch_size=2)
    assert found.kl == pytest.approx(wanted.item(), rel=1e-4)
    assert found.agreement == pytest.approx(agreement)
    assert found.agreement_low < found.agreement < found.agreement_high


def wrapped_logits(model: Any) -> Any:
    """A model called without a mask, which whole rows do not need."""

    def call(input_ids: Tensor) -> Any:
        keep = input_ids.shape[1]
        mask = torch.ones_like(input_ids)
        return model(input_ids=input_ids, attention_mask=mask, logits_to_keep=keep)

    return call


def test_gradients_are_those_of_the_plain_formula() -> None:
    model = tiny_model("llama")
    reference = build_reference(model, rows())
    trained = changed(tiny_model("llama").requires_grad_(True), 0.03)
    batch = collated(list(reference.examples))
    kl = kl_to_reference(logits_of(trained, batch), batch, reference)
    assert kl is not None
    (3 * kl).backward()
    found = {name: p.grad.clone() for name, p in trained.named_parameters()}
    trained.zero_grad()
    (3 * direct(model, trained, rows())[0]).backward()
    for name, parameter in trained.named_parameters():
        assert float(parameter.grad.abs().max()) > 0
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_only_general_rows_count() -> None:
    model = tiny_model("llama")
    general = build_reference(model, rows())
    changed(model, 0.03)
    ordinary = rows(seed=1)
    batch = collated([ordinary[0], general.examples[2], ordinary[1], general.examples[0]])
    kl = kl_to_reference(logits_of(model, batch), batch, general)
    alone = collated([general.examples[2], general.examples[0]])
    wanted = kl_to_reference(logits_of(model, alone), alone, general)
    torch.testing.assert_close(kl, wanted)
    none = collated(ordinary)
    assert kl_to_reference(logits_of(model, none), none, general) is None


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_base_stays_what_it_was_when_every_weight_trains(family: str) -> None:
    model = tiny_model(family).requires_grad_(True)
    reference = build_reference(model, rows())
    changed(model, 0.03)
    wanted, _ = direct(tiny_model(family), model, rows())
    assert measure_retention(model, reference).kl == pytest.approx(wanted.item(), rel=1e-4)


def test_a_head_that_does_not_train_is_not_copied() -> None:
    model = tiny_model("llama").requires_grad_(False)
    weight = retention.frozen_head(model)._weight
    assert weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_final_states_are_what_the_head_reads(wrap: Any) -> None:
    model = tiny_model("qwen3")
    batch = collated(rows())
    wrapped = wrap(model)
    with torch.no_grad():
        states = final_hidden_states(wrapped, batch["input_ids"], batch["attention_mask"], 5)
        logits = logits_of(wrapped, {**batch, "logits_to_keep": 5})
        torch.testing.assert_close(model.lm_head(states), logits)


def test_steps_along_the_gradient_bring_the_base_back() -> None:
    model = tiny_model("llama")
    reference = build_reference(model, rows())
    changed(model, 0.03)
    before = measure_retention(model, reference)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch = collated(list(reference.examples))
    for _ in range(30):
        optimizer.zero_grad()
        kl = kl_to_reference(logits_of(model, batch), batch, reference)
        assert kl is not None
        kl.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = measure_retention(model, reference)
    assert after.kl < 0.2 * before.kl
    assert after.agreement > before.agreement


def test_measuring_changes_neither_mode_nor_random_state() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    reference = build_reference(model, rows())
    state = torch.random.get_rng_state()
    assert measure_retention(model, reference).agreement == 1.0
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("tokens", "answer"), [((), 0), ((5, 6), 0), ((5, 6), 2)])
def test_an_example_without_an_answer(tokens: tuple[int, ...], answer: int) -> None:
    with pytest.raises(ConfigError, match=r"general example 6 .* needs an answer"):
        build_reference(tiny_model("llama"), [*rows(), Encoded(tokens, answer)])


def test_nothing_to_refer_to() -> None:
    with pytest.raises(ConfigError, match="no general examples"):
        build_reference(tiny_model("llama"), [])


class TestPrepare:
    def prepare(self, directory: Path, **settings: Any) -> Any:
        phases: list[str] = []
        prepared = prepare_retention(
            tiny_model("llama"),
            tiny_tokenizer(),
            RetentionConfig(**{"max_answer_tokens": 5, **settings}),
            model_fingerprint="ab" * 32,
            max_positions=256,
            cache=directory,
            progress=lambda phase, done, total: phases.append(phase),
        )
        return prepared, set(phases)

    def prompts(self, directory: Path) -> Path:
        file = directory / "prompts.txt"
        file.write_text("".join(f"prompt {number}\n" for number in range(12)))
        return file

    def test_what_is_replayed_is_not_what_measures(self, tmp_path: Path) -> None:
        prepared, _ = self.prepare(tmp_path, prompts=self.prompts(tmp_path), num_replay=6)
        replayed = {example.input_ids for example in prepared.replay.examples}
        held_out = {example.input_ids for example in prepared.held_out.examples}
        assert (len(replayed), len(held_out)) == (6, 3)
        assert not replayed & held_out

    def test_a_second_run_reads_the_answers(self, tmp_path: Path) -> None:
        first, phases = self.prepare(tmp_path, prompts=self.prompts(tmp_path))
        second, later = self.prepare(tmp_path, prompts=self.prompts(tmp_path))
        assert len(phases) == 4
        assert len(later) == 2
        assert first.replay.examples == second.replay.examples
        assert torch.equal(first.held_out.hidden_states, second.held_out.hidden_states)

    def test_nothing_is_replayed_but_retention_measured(self, tmp_path: Path) -> None:
        prepared, _ = self.prepare(
            tmp_path, prompts=self.prompts(tmp_path), replay_share=0, num_held_out=2
        )
        assert prepared.replay is None
        assert len(prepared.held_out.examples) == 2

    def test_conversations_with_answers_of_ones_own(self, tmp_path: Path) -> None:
        file = tmp_path / "chats.jsonl"
        lines = [{"prompt": f"prompt {number}", "completion": "apples"} for number in range(9)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        prepared, phases = self.prepare(tmp_path, prompts=file)
        assert len(phases) == 2
        assert (len(prepared.replay.examples), len(prepared.held_out.examples)) == (7, 2)
        tokenizer = tiny_tokenizer()
        for number, example in zip((4, 8), prepared.held_out.examples, strict=True):
            assert f"prompt {number - 1}" in tokenizer.decode(example.input_ids)
            answer = tokenizer.decode(example.input_ids[-example.num_answer :])
            assert answer == "apples<|end|>"

    def test_too_few_conversations(self, tmp_path: Path) -> None:
        file = tmp_path / "chats.jsonl"
        file.write_text('{"prompt": "p", "completion": "c"}\n' * 3)
        with pytest.raises(ConfigError, match="3 examples; give 4 or more"):
            self.prepare(tmp_path, prompts=file)

    def test_a_prompt_longer_than_the_context(self, tmp_path: Path) -> None:
        file = tmp_path / "prompts.txt"
        file.write_text(f"one\ntwo\nthree\n{'four ' * 300}\n")
        with pytest.raises(ConfigError, match=r"'four four .* context is 256"):
            self.prepare(tmp_path, prompts=file)
        assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
