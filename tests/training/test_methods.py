"""Each method begins as the base model, trains what it says, and saves what serves the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from privatelora.errors import ConfigError, PartitionError
from privatelora.partition.adapter import read_adapter
from privatelora.runtime.chat import TextModel
from privatelora.runtime.unsplit import open_unsplit
from privatelora.training.base_model import BaseModel, load_base_model
from privatelora.training.methods import (
    FullMethod,
    LoraMethod,
    MethodConfig,
    PrivateLoraMethod,
    Trainable,
    make_trainable,
)
from tests.partition.tiny import FAMILIES, save_tiny, tiny_model

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "per layer": {},
    "every 2": {"every": 2},
    "all": {"every": "all"},
    "some layers": {"layers": "0,2-3", "every": 2, "targets": "q,v", "scaling": 0.5},
    "random basis": {"basis": "random", "seed": 3},
}
IDS = torch.tensor([[5, 17, 101, 33, 8, 150, 44]])


def private(**options: Any) -> PrivateLoraMethod:
    return PrivateLoraMethod(**{"rank_up": 8, "rank_down": 8, **options})


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(save_tiny("llama", tmp_path / "model"))


def base_of(source: str) -> BaseModel:
    return load_base_model(source, torch.float32)


def logits_of(trainable: Trainable) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = trainable.model(input_ids=IDS).logits
    return logits


async def served_logits(text_model: TextModel) -> torch.Tensor:
    sequence = await text_model.model.open_sequence(16)
    return await sequence.forward(IDS[0].tolist(), 0, "all")


def shake(trainable: Trainable, seed: int = 0) -> None:
    """Change every parameter that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


METHODS: dict[str, MethodConfig] = {
    "privatelora": private(every=2),
    "trained basis": private(train_basis=True),
    "lora": LoraMethod(name="lora", rank=4),
    "lora of q, k, v in two layers": LoraMethod(name="lora", targets="qkv", layers="1,3", rank=4),
    "full": FullMethod(name="full"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_fresh_one_is_the_base_model(source: str, method: MethodConfig) -> None:
    expected = tiny_model("llama")(input_ids=IDS).logits.detach()
    assert torch.equal(logits_of(make_trainable(base_of(source), method)), expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_saved_is_what_was_trained(
    source: str, method: MethodConfig, tmp_path: Path
) -> None:
    trained = make_trainable(base_of(source), method)
    shake(trained)
    trained.save(tmp_path / "out")
    again = make_trainable(base_of(source), method)
    again.load(tmp_path / "out")
    assert torch.equal(logits_of(again), logits_of(trained))
    assert not torch.allclose(logits_of(again), logits_of(make_trainable(base_of(source), method)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
async def test_the_runtime_computes_what_was_trained(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = str(save_tiny(family, tmp_path / "model"))
    method = private(**options)
    trained = make_trainable(base_of(source), method)
    shake(trained)
    written = trained.save(tmp_path / "out")
    text_model = open_unsplit(
        source,
        adapter=written["adapter"],
        basis=method.basis,
        seed=method.seed,
        dtype="float32",
    )
    served = await served_logits(text_model)
    torch.testing.assert_close(served, logits_of(trained)[0], rtol=1e-4, atol=1e-4)


def test_only_m_trains(source: str) -> None:
    trainable = make_trainable(base_of(source), private(every=2))
    assert trainable.plan is not None
    assert trainable.num_parameters == trainable.plan.num_parameters == 4 * 3 * 8 * 8
    trainable.model(input_ids=IDS).logits.sum().backward()
    grads = [name for name, p in trainable.model.named_parameters() if p.grad is not None]
    assert len(grads) == 12
    assert all("lora_M" in name for name in grads)


def test_gradient_checkpointing_changes_no_gradient(source: str) -> None:
    found = []
    for checkpointing in (False, True):
        trainable = make_trainable(base_of(source), private(every=2))
        shake(trainable)
        if checkpointing:
            trainable.model.activation_checkpointing_enable(  # type: ignore[operator]
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
            trainable.model.train()
        trainable.model(input_ids=IDS).logits.square().mean().backward()
        found.append([p.grad for p in trainable.model.parameters() if p.requires_grad])
    for without, with_it in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without)


async def test_a_trained_basis_is_another_basis_and_says_so(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = make_trainable(base_of(source), private(train_basis=True))
    assert "no longer public" in caplog.text
    shake(trained)
    written = trained.save(tmp_path / "out")
    assert read_adapter(written["adapter"]).basis_fingerprint != trained_elsewhere(source, tmp_path)
    text_model = open_unsplit(
        source, adapter=written["adapter"], basis=str(written["basis"]), dtype="float32"
    )
    served = await served_logits(text_model)
    torch.testing.assert_close(served, logits_of(trained)[0], rtol=1e-4, atol=1e-4)


def trained_elsewhere(source: str, tmp_path: Path) -> str:
    """The fingerprint of the basis that does not train."""
    written = make_trainable(base_of(source), private()).save(tmp_path / "frozen")
    return read_adapter(written["adapter"]).basis_fingerprint


def test_an_adapter_of_another_arrangement_is_refused(source: str, tmp_path: Path) -> None:
    make_trainable(base_of(source), private(every=2)).save(tmp_path / "out")
    with pytest.raises(PartitionError, match="another arrangement: every is 2 there and 1"):
        make_trainable(base_of(source), private()).load(tmp_path / "out")


def test_full_in_few_bits_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match="method full needs dtype float32"):
        make_trainable(load_base_model(source, torch.bfloat16), FullMethod(name="full"))
