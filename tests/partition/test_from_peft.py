"""A LoRA of the PEFT library becomes an adapter: read, projected, and its losses reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from privatelora.benchmarks.baseline import attach_adapter
from privatelora.errors import PartitionError
from privatelora.partition.adapter import load_adapter, read_adapter
from privatelora.partition.basis import lora_a_name, lora_b_name
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.from_peft import Inputs, left_out, project
from privatelora.partition.from_peft_file import PeftLora, read_peft
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import make_plan
from privatelora.partition.shard import open_shard
from privatelora.runtime.calibration import (
    ListenedModel,
    WholeModel,
    divergence,
    open_model,
    public_basis,
)
from tests.partition.shards import Command
from tests.partition.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")
TOKENS = [
    [int(i) for i in torch.randperm(190, generator=torch.manual_seed(s))[:60]] for s in (1, 2)
]
QKV = ["q_proj", "k_proj", "v_proj"]
# PEFT warns of what its own defaults are, and of tied weights.
pytestmark = pytest.mark.filterwarnings("ignore")


def peft_model(family: str = "llama", *, std: float = 0.2, **options: Any) -> Any:
    """A tiny model with a LoRA that is not zero."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 6, "target_modules": QKV, **options}
    model = get_peft_model(tiny_model(family), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or value.requires_grad:
                value.add_(std * torch.randn(value.shape, generator=generator))
    return model.eval()


def saved(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


def read(model_dir: Path, lora_dir: Path) -> PeftLora:
    with open_checkpoint(str(model_dir)) as checkpoint:
        return read_peft(lora_dir, checkpoint.config)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = torch.cat([model(torch.tensor([ids])).logits[0] for ids in TOKENS])
    return found


def put_in_span(model: Any, plan: Plan, basis: dict[str, torch.Tensor]) -> None:
    """Turn a LoRA's A into combinations of the basis' rows, its B into those of its columns."""
    generator = torch.Generator().manual_seed(4)
    layers = model.base_model.model.model.layers
    for point in plan.points:
        blocks = torch.split(basis[lora_a_name(point)], plan.rank_up)
        for target in plan.targets:
            lora = getattr(layers[point.layer].self_attn, f"{target}_proj")
            up, down = lora.lora_A["default"].weight, lora.lora_B["default"].weight
            columns = basis[lora_b_name(point.layer, target)]
            mix_up = torch.randn(up.shape[0], plan.rank_up, generator=generator)
            mix_down = torch.randn(plan.rank_down, down.shape[1], generator=generator)
            with torch.no_grad():
                up.copy_(mix_up @ blocks[plan.block(target)] / 4)
                down.copy_(columns @ mix_down / 4)


@pytest.mark.parametrize("with_inputs", [False, True], ids=["weights", "inputs"])
@pytest.mark.parametrize(
    ("family", "basis_kind", "options"),
    [
        ("llama", "svd", {}),
        ("llama-tied", "random", {"use_rslora": True}),
        ("qwen2", "svd", {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}}),
        (
            "qwen3",
            "random",
            {"alpha_pattern": {"model.layers.2.self_attn.k_proj": 20, "v_proj": 1}},
        ),
        ("mistral", "svd", {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k_proj": 9}}),
    ],
)
def test_a_lora_in_the_span_of_the_basis_is_recovered(
    tmp_path: Path, family: str, basis_kind: str, options: dict[str, Any], with_inputs: bool
) -> None:
    save_tiny(family, tmp_path / "model")
    model = peft_model(family, **options)
    with open_model(str(tmp_path / "model")) as (source, checkpoint):
        plan = make_plan(source.config, rank_up=12, rank_down=10, scaling=0.5)
        basis, _, _ = public_basis(checkpoint, plan, basis_kind, 0)
        put_in_span(model, plan, basis)
        lora = read_peft(saved(model, tmp_path / "lora"), source.config)
        inputs = ListenedModel(source, CPU).inputs(TOKENS) if with_inputs else None
        weights, lost = project(lora, plan, basis, source.read, inputs)
        assert left_out(lora, plan, source.read) == []
    expected = logits_of(model)
    base = logits_of(tiny_model(family))
    found = logits_of(attach_adapter(tiny_model(family), plan, basis, weights))
    scale = float(expected.abs().max())
    assert float((expected - base).abs().max()) > 0.05 * scale
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert len(lost) == 12
    for item in lost:
        assert item.weights is not None
        assert item.weights < 1e-9
        assert (item.fitted is not None) == with_inputs
        assert (item.fitted or 0.0) < 1e-9


@pytest.mark.parametrize("every", [1, 2, 4])
def test_what_it_says_is_lost_is_what_is_lost(tmp_path: Path, every: int) -> None:
    """Against the definition, with inputs and outputs taken from transformers by hooks."""
    save_tiny("llama", tmp_path / "model")
    model = peft_model(r=6)
    saved(model, tmp_path / "lora")
    with open_model(str(tmp_path / "model")) as (source, checkpoint):
        plan = make_plan(source.config, rank_up=16, rank_down=8, every=every)
        basis, _, _ = public_basis(checkpoint, plan, "random", 0)
        lora = read_peft(tmp_path / "lora", source.config)
        listened = ListenedModel(source, CPU)
        inputs, held_out = listened.inputs(TOKENS[:1]), listened.inputs(TOKENS[1:])
        weights, lost = project(lora, plan, basis, source.read, inputs, held_out)
    assert len(lost) == 12
    expected_inputs = transformers_inputs(tiny_model("llama"), TOKENS[1])
    layers = model.base_model.model.model.layers
    for item in lost:
        layer, target = item.layer, item.target
        torch.testing.assert_close(held_out[layer], expected_inputs[layer], atol=1e-4, rtol=1e-4)
        [point] = [point for point in plan.points if layer in point.layers]
        start = plan.block(target) * plan.rank_up
        lora_a = basis[lora_a_name(point)][start : start + plan.rank_up]
        ours = basis[lora_b_name(layer, target)] @ weights[layer, target] @ lora_a
        theirs = getattr(layers[layer].self_attn, f"{target}_proj").get_delta_weight("default")
        wanted = expected_inputs[layer] @ theirs.T
        error = wanted - expected_inputs[point.layer] @ ours.T
        assert item.held_out == pytest.approx(share(error, wanted), rel=1e-3)
        assert item.fitted is not None
        assert 0 < item.fitted < 1
        if layer == point.layer:
            assert item.weights == pytest.approx(share(theirs - ours, theirs), rel=1e-3)
        else:
            assert item.weights is None


def share(error: torch.Tensor, whole: torch.Tensor) -> float:
    return float(error.square().sum() / whole.square().sum())


def transformers_inputs(model: Any, token_ids: list[int]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _m, _a, out: found.append(out[0]))
    with torch.no_grad():
        model(torch.tensor([token_ids]))
    return found


@pytest.mark.parametrize("every", [1, 2])
def test_no_other_m_loses_less(tmp_path: Path, every: int) -> None:
    save_tiny("llama", tmp_path / "model")
    saved(peft_model(r=6), tmp_path / "lora")
    with open_model(str(tmp_path / "model")) as (source, checkpoint):
        plan = make_plan(source.config, rank_up=8, rank_down=8, every=every)
        basis, _, _ = public_basis(checkpoint, plan, "svd", 0)
        lora = read_peft(tmp_path / "lora", source.config)
        inputs = ListenedModel(source, CPU).inputs(TOKENS)
        weights, lost = project(lora, plan, basis, source.read, inputs)
        delta = lora.changes["model.layers.1.self_attn.k_proj.weight"].delta(source.read)
    point = plan.points[(1 // every)]
    block = plan.block("k") * plan.rank_up
    u = inputs[point.layer] @ basis[lora_a_name(point)][block : block + plan.rank_up].T
    lora_b = basis[lora_b_name(1, "k")]
    wanted = inputs[1] @ delta.T
    # vec(U M^T B^T) = (U kron B) vec(M^T), row by row.
    system = torch.kron(u.double().contiguous(), lora_b.double().contiguous())
    best = torch.linalg.lstsq(system, wanted.double().reshape(-1, 1)).solution
    residual = system @ best - wanted.double().reshape(-1, 1)
    [item] = [item for item in lost if (item.layer, item.target) == (1, "k")]
    assert item.fitted is not None
    assert item.fitted == pytest.approx(share(residual, wanted.double()), rel=1e-3)
    assert torch.allclose(
        weights[1, "k"].double(), best.reshape(plan.rank_up, plan.rank_down).T, atol=0.02
    )


def test_few_tokens_do_not_spoil_what_the_weights_tell(tmp_path: Path) -> None:
    """Five tokens do not show a basis of rank 12 in all directions."""
    save_tiny("llama", tmp_path / "model")
    model = peft_model()
    with open_model(str(tmp_path / "model")) as (source, checkpoint):
        plan = make_plan(source.config, rank_up=12, rank_down=10)
        basis, _, _ = public_basis(checkpoint, plan, "random", 0)
        put_in_span(model, plan, basis)
        lora = read_peft(saved(model, tmp_path / "lora"), source.config)
        inputs = ListenedModel(source, CPU).inputs([TOKENS[0][:5]])
        weights, _ = project(lora, plan, basis, source.read, inputs)
        exact, _ = project(lora, plan, basis, source.read, None)
    for key, m in weights.items():
        torch.testing.assert_close(m, exact[key], atol=1e-4, rtol=1e-4)


EVERYWHERE = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": EVERYWHERE}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
        (
            "qwen3",
            {"target_modules": EVERYWHERE, "use_rslora": True, "rank_pattern": {"up_proj": 2}},
        ),
    ],
)
def test_model_and_lora_are_what_peft_computes(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    save_tiny(family, tmp_path / "model")
    model = peft_model(family, std=0.1, **options)
    saved(model, tmp_path / "lora")
    expected = torch.log_softmax(logits_of(model), dim=-1)
    with open_model(str(tmp_path / "model")) as (source, _):
        lora = read_peft(tmp_path / "lora", source.config)
        with_lora = WholeModel(source, CPU, changes=lora.changes)
        found = [with_lora.log_probs(token_ids) for token_ids in TOKENS]
        same = divergence(with_lora, TOKENS, found)
        other = divergence(WholeModel(source, CPU), TOKENS, found)
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-4, rtol=1e-4)
    assert (same.kl, same.top1_agreement) == (0.0, 1.0)
    base = torch.log_softmax(logits_of(tiny_model(family)), dim=-1)
    kl = torch.nn.functional.kl_div(base, expected, log_target=True, reduction="none").sum(-1)
    assert other.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    agreement = (base.argmax(-1) == expected.argmax(-1)).float().mean()
    assert other.top1_agreement == pytest.approx(float(agreement))


def test_parts_without_a_place_are_listed_with_their_share(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path / "model")
    model = peft_model(
        "qwen2",
        target_modules=[*QKV, "o_proj", "down_proj"],
        modules_to_save=["lm_head"],
        bias="lora_only",
    )
    saved(model, tmp_path / "lora")
    changed = model.merge_and_unload().state_dict()
    base = tiny_model("qwen2").state_dict()
    energy = {name: float((changed[name] - value).square().sum()) for name, value in base.items()}
    total = sum(energy.values())

    def of(*ends: str, layers: range = range(4)) -> float:
        names = [f"model.layers.{layer}.{end}" for layer in layers for end in ends]
        return sum(energy[name] for name in names) / total

    with open_model(str(tmp_path / "model")) as (source, _):
        lora = read_peft(tmp_path / "lora", source.config)
        plan = make_plan(source.config, layers="0-2", targets="q,v", rank_up=8, rank_down=8)
        parts = {part.part: part for part in left_out(lora, plan, source.read)}
    assert {name: part.num_parameters for name, part in parts.items()} == {
        "self_attn.o_proj": 4,
        "mlp.down_proj": 4,
        "self_attn.k_proj": 4,
        "self_attn.q_proj": 1,
        "self_attn.v_proj": 1,
        "self_attn.q_proj.bias": 4,
        "self_attn.k_proj.bias": 4,
        "self_attn.v_proj.bias": 4,
        "lm_head": 1,
    }
    assert parts["self_attn.o_proj"].share == pytest.approx(of("self_attn.o_proj.weight"), rel=1e-3)
    assert parts["self_attn.q_proj"].share == pytest.approx(
        of("self_attn.q_proj.weight", layers=range(3, 4)), rel=1e-3
    )
    assert parts["lm_head"].share == pytest.approx(energy["lm_head.weight"] / total, rel=1e-3)
    kept = of("self_attn.q_proj.weight", "self_attn.v_proj.weight", layers=range(3))
    assert sum(part.share for part in parts.values()) == pytest.approx(1 - kept, rel=1e-3)
    shares = [part.share for part in parts.values()]
    assert shares == sorted(shares, reverse=True)


def test_a_torch_file_is_read_too(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    saved(peft_model(), tmp_path / "lora")
    expected = read(tmp_path / "model", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    found = read(tmp_path / "model", tmp_path / "lora")
    assert found.changes.keys() == expected.changes.keys()

    def fail(name: str) -> torch.Tensor:
        raise AssertionError(name)

    for name, change in found.changes.items():
        assert torch.equal(change.delta(fail), expected.changes[name].delta(fail))


# What is wrong with a folder, and what is said of it.

Damage = Callable[[Path], object]


def setting(**changes: object) -> Damage:
    def change(lora: Path) -> None:
        path = lora / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def rewrite(lora: Path) -> None:
        path = lora / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file({name: tensor.clone() for name, tensor in found.items()}, path)

    return rewrite


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "adapter_config.json").unlink(), "is not a PEFT adapter"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "adapter_config.json").write_text("[1]"), "it holds no object"),
        (lambda p: (p / "adapter_config.json").write_text(" " * (2 << 20)), "larger than"),
        (lambda p: (p / "adapter_model.safetensors").unlink(), "copy the whole folder"),
        (
            lambda p: (p / "adapter_model.safetensors").write_bytes(b"\xff" * 64),
            "not a safetensors",
        ),
        (setting(peft_type="IA3"), "peft_type is 'IA3'; only LORA can be projected"),
        (setting(peft_type=7), "peft_type is 7"),
        (setting(lora_bias=True), "lora_bias is set"),
        (setting(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens is set"),
        (setting(init_lora_weights="pissa"), "init_lora_weights 'pissa' has changed"),
        (setting(r=0), "r: Input should be greater than 0"),
        (setting(r=5), "has rank 4, adapter_config.json says 5"),
        (setting(lora_alpha=float("nan")), "lora_alpha: Input should be a finite number"),
        (setting(alpha_pattern={"q_proj": float("inf")}), "alpha_pattern.q_proj: Input should be"),
        (setting(rank_pattern={"(a*)*b": 4}), "too complicated to be read safely"),
        (setting(rank_pattern={"[": 4}), "is damaged"),
        (setting(use_dora=True), "has no magnitude of DoRA"),
        (tensors(lambda t: t.pop(A0)), "q_proj has no lora_A; the file is incomplete"),
        (tensors(lambda t: t[A0].fill_(torch.nan)), "holds infinite values or NaN"),
        (tensors(lambda t: t[A0].fill_(3e38)), "matrices is beyond float32"),
        (tensors(lambda t: t.update({A0: t[A0].to(torch.int32)})), "not floating-point numbers"),
        (tensors(lambda t: t.update({A0: t[A0][:, :9].clone()})), "has shape (64, 9) there"),
        (tensors(lambda t: t.update({A0: t[A0][:3].clone()})), "do not fit each other"),
        (tensors(lambda t: t.update({"transformer.h.0.lora_C": t[A0]})), "no part of a plain LoRA"),
        (tensors(lambda t: t.update({"score.weight": t[A0]})), "which this model does not have"),
        (
            tensors(lambda t: [t.pop(name) for name in list(t)] and t.update({"x": torch.ones(1)})),
            "which this model does not have",
        ),
        (
            tensors(lambda t: t.update({A0.replace("layers.0", "layers.9"): t[A0]})),
            "changes model.layers.9.self_attn.q_proj.weight, which this model does not have",
        ),
    ],
)
def test_bad_folders_get_one_clear_line(tmp_path: Path, damage: Damage, message: str) -> None:
    save_tiny("llama", tmp_path / "model", tokenizer=False)
    saved(peft_model(), tmp_path / "lora")
    damage(tmp_path / "lora")
    with pytest.raises(PartitionError) as caught:
        read(tmp_path / "model", tmp_path / "lora")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def test_a_torch_file_executes_nothing(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", tokenizer=False)
    saved(peft_model(), tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    torch.save({"a": Harmful(tmp_path / "trap")}, tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(PartitionError, match="nothing in it was executed"):
        read(tmp_path / "model", tmp_path / "lora")
    assert not (tmp_path / "trap").exists()


def test_a_lora_for_a_model_of_other_sizes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", hidden_size=32, tokenizer=False)
    saved(peft_model(), tmp_path / "lora")
    with pytest.raises(PartitionError, match=r"has shape \(32, 64\) there and \(16, 32\) in this"):
        read(tmp_path / "model", tmp_path / "lora")


def test_a_plan_that_meets_nothing_of_the_lora(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    saved(peft_model(target_modules=["q_proj"]), tmp_path / "lora")
    inputs: Inputs | None = None
    with open_model(str(tmp_path / "model")) as (source, checkpoint):
        lora = read_peft(tmp_path / "lora", source.config)
        for options, message in (
            ({"targets": "v"}, "changes none of the projections that the plan adapts"),
            ({"every": 2}, "let the model run on text"),
            ({"scaling": 0.0}, "scaling is 0"),
        ):
            plan = make_plan(source.config, rank_up=8, rank_down=8, **options)
            basis, _, _ = public_basis(checkpoint, plan, "random", 0)
            with pytest.raises(PartitionError, match=message):
                project(lora, plan, basis, source.read, inputs)


# The command.


@pytest.fixture
def model_and_lora(tmp_path: Path) -> tuple[Path, Path]:
    save_tiny("llama", tmp_path / "model")
    model = peft_model(target_modules=["q_proj", "v_proj", "o_proj"], layers_to_transform=[0, 2, 3])
    return tmp_path / "model", saved(model, tmp_path / "lora")


RANKS = ("--rank-up", 16, "--rank-down", 16)


def test_from_a_lora_to_shards_that_take_it(
    command: Command, model_and_lora: tuple[Path, Path], tmp_path: Path
) -> None:
    model, lora = model_and_lora
    out = tmp_path / "out"
    result = command("adapter", "from-peft", lora, out, "--model", model, *RANKS, "--json")
    assert (result.code, result.err) == (0, "")
    report = result.json
    assert report["arrangement"]["layers"] == [0, 2, 3]
    assert report["arrangement"]["targets"] == ["q", "v"]
    assert len(report["layers"]) == 6
    assert report["calibration_tokens"] > 1000
    assert report["outputs"]["positions"] == report["held_out_tokens"] > 300
    assert 0 < report["outputs"]["adapter"]["kl"] < report["outputs"]["base"]["kl"]
    assert [part["part"] for part in report["left_out"]] == ["self_attn.o_proj"]
    adapter_file = out / "adapter.safetensors"
    assert adapter_file.stat().st_mode & 0o777 == 0o600

    words = report["next_command"].split()
    assert words[:2] == ["privatelora", "partition"]
    split = command(*[tmp_path / "shards" if word == "SHARDS" else word for word in words[1:]])
    assert split.code == 0, split.err
    manifest = open_shard(tmp_path / "shards" / "edge", "edge").manifest
    fingerprints = manifest.fingerprints
    load_adapter(adapter_file, manifest.plan, fingerprints.basis, fingerprints.model)

    other = command("adapter", "from-peft", lora, tmp_path / "b", "--shards", tmp_path / "shards")
    assert other.code == 0, other.err
    assert "self_attn.o_proj (3x)" in other.out
    again = read_adapter(tmp_path / "b" / "adapter.safetensors")
    assert again.basis_fingerprint == fingerprints.basis
    for key, m in read_adapter(adapter_file).weights.items():
        torch.testing.assert_close(again.weights[key], m, atol=1e-4, rtol=1e-3)


def test_a_grouped_plan_and_a_text_of_ones_own(
    command: Command, model_and_lora: tuple[Path, Path], tmp_path: Path
) -> None:
    model, lora = model_and_lora
    (tmp_path / "plan.yaml").write_text("{every: all, rank_up: 16, rank_down: 8, targets: q}")
    (tmp_path / "text.txt").write_text("All that the wind carries comes back in the autumn. " * 40)
    options = ("--plan", tmp_path / "plan.yaml", "--calibration", tmp_path / "text.txt")
    arguments = (lora, tmp_path / "out", "--model", model, *options, "--rank-down", 10)
    result = command("adapter", "from-peft", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    adapter = read_adapter(tmp_path / "out" / "adapter.safetensors")
    assert (adapter.plan.every, adapter.plan.rank_down, adapter.plan.targets) == (4, 10, ("q",))
    assert not adapter.weights[1, "q"].any()  # the LoRA leaves this layer alone
    assert [row["layer"] for row in result.json["layers"]] == [0, 2, 3]
    assert [part["part"] for part in result.json["left_out"]] == [
        "self_attn.o_proj",
        "self_attn.v_proj",
    ]
    shown = command("adapter", "from-peft", *arguments)
    assert "exists; choose another directory" in shown.err


def test_from_the_weights_alone(
    command: Command, model_and_lora: tuple[Path, Path], tmp_path: Path
) -> None:
    model, lora = model_and_lora
    arguments = (lora, tmp_path / "out", "--model", model, *RANKS, "--calibration", "none")
    result = command("adapter", "from-peft", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["outputs"] is None
    assert all(row["fitted"] is None for row in result.json["layers"])
    assert all(0 < row["weights"] < 1 for row in result.json["layers"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --model or --shards"),
        (("--model", "{model}", "--shards", "{model}"), "give either --model or --shards"),
        (("--shards", "{model}", "--every", 2), "have a plan and a basis of their own"),
        (("--shards", "{model}"), "is not a shard"),
        (("--model", "{model}", "--seed", 3), "--seed belongs to --basis random"),
        (("--model", "{model}", "--every", 2, "--calibration", "none"), "grouped"),
        (("--model", "{model}", "--calibration", "nowhere.txt"), "cannot read nowhere.txt"),
        (("--model", "{model}", "--calibration", "{short}"), "too few to fit to"),
        (("--model", "{model}", "--calibration", "{binary}"), "is not UTF-8 text (byte 0)"),
        (("--model", "{model}", "--device", "gpu"), "choose cpu, cuda or cuda:N"),
        (("--model", "{model}", "--targets", "k"), "changes none of the projections"),
    ],
)
def test_wrong_requests(
    command: Command,
    model_and_lora: tuple[Path, Path],
    tmp_path: Path,
    options: tuple[object, ...],
    message: str,
) -> None:
    model, lora = model_and_lora
    (tmp_path / "short").write_text("two words")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    names = {"model": model, "short": tmp_path / "short", "binary": tmp_path / "binary"}
    given = [str(option).format(**names) for option in options]
    ranks = () if "--shards" in given else RANKS
    result = command("adapter", "from-peft", lora, tmp_path / "out", *given, *ranks)
    assert result.code == 1
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
