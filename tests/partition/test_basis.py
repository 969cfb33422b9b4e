"""Where A and B come from: seeds, singular directions, files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from privatelora.errors import PartitionError
from privatelora.partition.basis import (
    Basis,
    BasisFingerprint,
    FileBasis,
    RandomBasis,
    basis_shapes,
)
from privatelora.partition.basis_svd import SvdBasis, leading_directions
from privatelora.partition.models.config import DecoderConfig, RopeConfig
from privatelora.partition.models.families import projection_weight
from privatelora.partition.plan import Plan, Target
from privatelora.partition.plan_file import make_plan

CONFIG = DecoderConfig(
    family="llama",
    hidden_size=48,
    intermediate_size=64,
    num_layers=5,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=100,
    max_positions=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=1e4),
)
"""q is (64, 48), taller than wide; k and v are (16, 48)."""

PER_LAYER = make_plan(CONFIG, rank_up=6, rank_down=4, layers="1,2,4")
GROUPED = make_plan(CONFIG, rank_up=10, rank_down=4, layers="0,1,3,4", every=3)


def frozen(layer: int, target: Target) -> Tensor:
    generator = torch.Generator().manual_seed(10 * layer + ord(target))
    return torch.randn(CONFIG.projection_size(target), 48, generator=generator)


WEIGHTS = {
    projection_weight(layer, target): frozen(layer, target)
    for layer in range(5)
    for target in ("q", "k", "v")
}


def svd_basis(plan: Plan) -> SvdBasis:
    return SvdBasis(plan, CONFIG, WEIGHTS.__getitem__)


def collect(basis: Basis) -> dict[str, Tensor]:
    tensors = list(basis.tensors())
    assert len({name for name, _ in tensors}) == len(tensors)
    return dict(tensors)


def fingerprint_of(tensors: dict[str, Tensor]) -> str:
    digest = BasisFingerprint()
    for name, tensor in tensors.items():
        digest.add(name, tensor)
    return digest.hexdigest()


@pytest.mark.parametrize("plan", [PER_LAYER, GROUPED], ids=["per layer", "grouped"])
@pytest.mark.parametrize("make", [svd_basis, lambda plan: RandomBasis(plan, CONFIG, 0)])
def test_a_basis_has_the_plans_tensors_in_float32(
    plan: Plan, make: Callable[[Plan], Basis]
) -> None:
    tensors = collect(make(plan))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == basis_shapes(
        plan, CONFIG
    )
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors.values())


def test_names_and_shapes() -> None:
    shapes = basis_shapes(GROUPED, CONFIG)
    assert shapes["points.0.lora_A.weight"] == (10, 48)
    assert shapes["points.1.lora_A.weight"] == (10, 48)
    assert shapes["model.layers.3.self_attn.q_proj.lora_B.weight"] == (64, 4)
    assert shapes["model.layers.3.self_attn.v_proj.lora_B.weight"] == (16, 4)
    assert len(shapes) == 2 + 4 * 3
    assert basis_shapes(PER_LAYER, CONFIG)["points.2.lora_A.weight"] == (18, 48)


def test_random_numbers_are_those_of_shake_256() -> None:
    """Worked out in whole numbers, so that no library can change the basis of a published M."""
    name = "model.layers.1.self_attn.k_proj.lora_B.weight"
    tensor = collect(RandomBasis(PER_LAYER, CONFIG, 7))[name]
    stream = hashlib.shake_256(f"privatelora basis\n7\n{name}".encode()).digest(4 * 16 * 4)
    for index, value in enumerate(tensor.flatten().tolist()):
        word = int.from_bytes(stream[4 * index : 4 * index + 4], "little")
        assert value == ((word >> 8) - 2**23) / 2**23 * 0.5  # 1/sqrt(4): every product is exact


def test_random_numbers_fill_their_range_evenly() -> None:
    plan = make_plan(CONFIG, rank_up=48, rank_down=4)
    tensors = collect(RandomBasis(plan, CONFIG, 0))
    values = torch.cat([tensors[f"points.{i}.lora_A.weight"].flatten() for i in range(5)])
    bound = 1 / math.sqrt(48)
    assert float(values.abs().max()) <= bound
    counts = torch.histc(values, bins=8, min=-bound, max=bound)
    expected = values.numel() / 8
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # chi-square, 7 d.o.f., 0.1 %


def test_a_random_tensor_depends_on_seed_and_name_alone() -> None:
    few = collect(RandomBasis(PER_LAYER, CONFIG, 3))
    every_layer = make_plan(CONFIG, rank_up=6, rank_down=4)
    more = collect(RandomBasis(every_layer, CONFIG, 3))
    shared = few.keys() & more.keys()
    assert "model.layers.4.self_attn.v_proj.lora_B.weight" in shared
    for name in shared:
        assert torch.equal(few[name], more[name])
    other = collect(RandomBasis(PER_LAYER, CONFIG, 4))
    assert not any(torch.equal(few[name], other[name]) for name in few)
    assert not torch.equal(
        few["model.layers.1.self_attn.k_proj.lora_B.weight"],
        few["model.layers.1.self_attn.v_proj.lora_B.weight"],
    )


def test_svd_per_layer_reproduces_the_best_approximation() -> None:
    tensors = collect(svd_basis(PER_LAYER))
    a = tensors["points.1.lora_A.weight"]  # of layer 2
    for block, target in enumerate(("q", "k", "v")):
        weight = WEIGHTS[f"model.layers.2.self_attn.{target}_proj.weight"]
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        rows = a[6 * block : 6 * block + 6]
        torch.testing.assert_close(rows @ rows.T, torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.T @ rows, vh[:6].T @ vh[:6], atol=1e-4, rtol=0)
        b = tensors[f"model.layers.2.self_attn.{target}_proj.lora_B.weight"]
        torch.testing.assert_close(b.norm(dim=0), s[:4], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close((b / s[:4]).abs(), u[:, :4].abs(), atol=1e-4, rtol=0)


def test_svd_grouped_reads_the_stacked_projections() -> None:
    tensors = collect(svd_basis(GROUPED))
    spans = {0: (0, 1, 3), 1: (4,)}
    for point, layers in spans.items():
        stacked = torch.cat([WEIGHTS[projection_weight(i, t)] for i in layers for t in "qkv"])
        vh = torch.linalg.svd(stacked)[2][:10]
        rows = tensors[f"points.{point}.lora_A.weight"]
        torch.testing.assert_close(rows.abs(), vh.abs(), atol=1e-3, rtol=0)
    u, s, _ = torch.linalg.svd(WEIGHTS[projection_weight(3, "v")], full_matrices=False)
    b = tensors["model.layers.3.self_attn.v_proj.lora_B.weight"]
    torch.testing.assert_close(b.abs(), (u[:, :4] * s[:4]).abs(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("plan", [PER_LAYER, GROUPED], ids=["per layer", "grouped"])
def test_svd_is_the_same_twice_and_its_signs_are_fixed(plan: Plan) -> None:
    first, second = collect(svd_basis(plan)), collect(svd_basis(plan))
    assert fingerprint_of(first) == fingerprint_of(second)
    flipped = collect(SvdBasis(plan, CONFIG, lambda name: -WEIGHTS[name]))
    for name, tensor in first.items():
        directions = tensor if "lora_A" in name else tensor.T
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        assert bool((largest > 0).all()), name
        torch.testing.assert_close(flipped[name], tensor, atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    out_features=st.integers(1, 24),
    in_features=st.integers(1, 24),
    rank=st.integers(0, 24),
    seed=st.integers(0, 1000),
)
def test_directions_are_orthonormal_whatever_the_rank_of_the_matrix(
    out_features: int, in_features: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out_features, rank, generator=generator)
    weight = left @ torch.randn(rank, in_features, generator=generator)
    num = min(out_features, in_features)
    right, scaled = leading_directions(weight, num, num, "test")
    torch.testing.assert_close(right @ right.T, torch.eye(num), atol=1e-5, rtol=0)
    values = torch.linalg.svdvals(weight)
    size = float(values[0]) + 1e-3
    torch.testing.assert_close(scaled.norm(dim=0) / size, values / size, atol=1e-5, rtol=0)
    torch.testing.assert_close(weight @ right.T @ right, weight, atol=1e-5 * size, rtol=0)


def test_svd_takes_weights_in_half_precision() -> None:
    half = {name: tensor.to(torch.bfloat16) for name, tensor in WEIGHTS.items()}
    whole = {name: tensor.float() for name, tensor in half.items()}
    one = collect(SvdBasis(PER_LAYER, CONFIG, half.__getitem__))
    two = collect(SvdBasis(PER_LAYER, CONFIG, whole.__getitem__))
    assert fingerprint_of(one) == fingerprint_of(two)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank_up": 17, "rank_down": 4}, "rank_up 17 .* k projection.* choose at most 16"),
        ({"rank_up": 49, "rank_down": 4, "targets": "q"}, "choose at most 48"),
        (
            {"rank_up": 4, "rank_down": 49, "targets": "q"},
            "rank_down 49 .* q projection.* choose at most 48",
        ),
        (
            {"rank_up": 17, "rank_down": 4, "targets": "k", "every": 2},
            "rank_up 17 .* shortest span.* choose at most 16",
        ),
    ],
)
def test_svd_says_which_rank_is_possible(options: dict[str, object], reason: str) -> None:
    with pytest.raises(PartitionError, match=reason):
        svd_basis(make_plan(CONFIG, **options))  # type: ignore[arg-type]


def test_svd_at_the_largest_rank_works() -> None:
    plan = make_plan(CONFIG, rank_up=16, rank_down=16, layers="0")
    rows = collect(svd_basis(plan))["points.0.lora_A.weight"][16:32]
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-5, rtol=0)


def test_svd_refuses_a_damaged_weight() -> None:
    bad = WEIGHTS | {projection_weight(2, "k"): torch.full((16, 48), math.nan)}
    with pytest.raises(PartitionError, match=r"layers\.2\.self_attn\.k_proj\.weight .*NaN"):
        collect(SvdBasis(PER_LAYER, CONFIG, bad.__getitem__))


def test_a_basis_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    tensors = collect(svd_basis(GROUPED))
    save_file(tensors, tmp_path / "basis.safetensors")
    basis = FileBasis(GROUPED, CONFIG, tmp_path / "basis.safetensors")
    assert fingerprint_of(collect(basis)) == fingerprint_of(tensors)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("points.1.lora_A.weight"), r"points\.1\.lora_A\.weight is missing"),
        (lambda t: t.update(more=torch.ones(1)), "tensor more is not expected"),
        (
            lambda t: t.update({"points.0.lora_A.weight": torch.ones(11, 48)}),
            r"points\.0\.lora_A\.weight has shape \(11, 48\), expected \(10, 48\)",
        ),
    ],
)
def test_a_basis_file_that_does_not_fit_is_refused_at_once(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], reason: str
) -> None:
    tensors = collect(RandomBasis(GROUPED, CONFIG, 0))
    change(tensors)
    save_file(tensors, tmp_path / "basis.safetensors")
    with pytest.raises(PartitionError, match=reason):
        FileBasis(GROUPED, CONFIG, tmp_path / "basis.safetensors")


@pytest.mark.parametrize(
    "bad", [torch.full((10, 48), math.inf), torch.ones(10, 48, dtype=torch.int64)]
)
def test_a_basis_file_of_other_things_than_numbers_is_refused(tmp_path: Path, bad: Tensor) -> None:
    tensors = collect(RandomBasis(GROUPED, CONFIG, 0)) | {"points.0.lora_A.weight": bad}
    save_file(tensors, tmp_path / "basis.safetensors")
    with pytest.raises(PartitionError, match=r"points\.0\.lora_A\.weight"):
        collect(FileBasis(GROUPED, CONFIG, tmp_path / "basis.safetensors"))


def test_the_fingerprint_ignores_order_and_sees_every_bit() -> None:
    tensors = collect(RandomBasis(PER_LAYER, CONFIG, 0))
    whole = fingerprint_of(tensors)
    assert fingerprint_of(dict(reversed(tensors.items()))) == whole
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed[-1, -1] = torch.nextafter(changed[-1, -1], torch.tensor(9.0))
        assert fingerprint_of(tensors | {name: changed}) != whole
    reshaped = {n: t.reshape(-1, 2) if n.startswith("points.0") else t for n, t in tensors.items()}
    assert fingerprint_of(reshaped) != whole
