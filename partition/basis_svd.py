"""A basis from the singular directions of the frozen projections (LoRA-XS, arXiv 2405.17604).

The eigenvectors of the smaller Gram matrix of each projection are taken in float64. One
4096 x 4096 projection takes about ten seconds on two cores. Beyond the projection itself the
work needs about 40 bytes for each number of that Gram matrix (0.6 GiB at 4096), and grouped
16 more for each number of the span's (hidden_size, hidden_size) Gram matrix.

A basis made here twice on one machine is the same to the bit; another build of the linear
algebra may round differently, so both shards have to come from one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from privatelora.errors import PartitionError
from privatelora.partition.basis import BasisProvenance, lora_a_name, lora_b_name
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import projection_weight
from privatelora.partition.plan import ExchangePoint, Plan

GRAM_ROWS = 1024
"""Rows taken into float64 at a time."""


class SvdBasis:
    """A: top right singular directions, orthonormal rows. B: top left ones times their values.

    Per layer each target's block of A comes from its own projection; grouped, the shared A
    comes from all projections of the span stacked on each other.
    """

    provenance = BasisProvenance(kind="svd")

    def __init__(self, plan: Plan, config: DecoderConfig, read: Callable[[str], Tensor]) -> None:
        """``read``: returns a frozen tensor by name, shape (out_features, hidden_size).

        Raises PartitionError if a rank is larger than the projections' matrices have.
        """
        check_ranks(plan, config)
        self._plan = plan
        self._read = read

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor."""
        for point in self._plan.points:
            if self._plan.every == 1:
                yield from self._per_layer(point)
            else:
                yield from self._grouped(point)

    def _per_layer(self, point: ExchangePoint) -> Iterator[tuple[str, Tensor]]:
        plan = self._plan
        blocks = []
        for target in plan.targets:
            name = projection_weight(point.layer, target)
            right, left = leading_directions(
                self._projection(name), plan.rank_up, plan.rank_down, name
            )
            blocks.append(right)
            yield lora_b_name(point.layer, target), left
        yield lora_a_name(point), torch.cat(blocks)

    def _grouped(self, point: ExchangePoint) -> Iterator[tuple[str, Tensor]]:
        plan = self._plan
        total: Tensor | None = None
        for layer in point.layers:
            for target in plan.targets:
                name = projection_weight(layer, target)
                weight = self._projection(name)
                gram = gram_matrix(weight)
                total = gram if total is None else total.add_(gram)
                del gram
                _, left = leading_directions(weight, 0, plan.rank_down, name)
                yield lora_b_name(layer, target), left
        if total is not None:
            yield lora_a_name(point), _shared_directions(total, plan.rank_up, lora_a_name(point))

    def _projection(self, name: str) -> Tensor:
        weight = self._read(name)
        if not bool(weight.isfinite().all()):
            raise PartitionError(
                f"tensor {name} of the checkpoint holds infinite values or NaN: it is damaged"
            )
        return weight


def check_ranks(plan: Plan, config: DecoderConfig) -> None:
    """Raise PartitionError if an svd basis of these ranks does not exist for the model."""
    for target in plan.targets:
        most = min(config.projection_size(target), config.hidden_size)
        advice = f"choose at most {most}, leave {target} out of targets, or use --basis random"
        if plan.rank_down > most:
            raise PartitionError(
                f"rank_down {plan.rank_down} is larger than the rank {most} of the {target} "
                f"projection, so its svd has too few directions; {advice}"
            )
        if plan.every == 1 and plan.rank_up > most:
            raise PartitionError(
                f"rank_up {plan.rank_up} is larger than the rank {most} of the {target} "
                f"projection, so its svd has too few directions; {advice}"
            )
    if plan.every > 1:
        rows = sum(config.projection_size(target) for target in plan.targets)
        most = min(min(len(point.layers) for point in plan.points) * rows, config.hidden_size)
        if plan.rank_up > most:
            raise PartitionError(
                f"rank_up {plan.rank_up} is larger than the rank {most} of the projections of the "
                f"shortest span together; choose at most {most}, or use --basis random"
            )


def gram_matrix(weight: Tensor) -> Tensor:
    """Return W^T W in float64: (in, in) from (out, in), a slice of rows at a time."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for rows in torch.split(weight, GRAM_ROWS):
        exact = rows.to(torch.float64)
        total.addmm_(exact.T, exact)
    return total


def leading_directions(
    weight: Tensor, num_right: int, num_left: int, name: str
) -> tuple[Tensor, Tensor]:
    """Return the top singular directions of W (out, in), float32, largest first.

    Right ones (num_right, in) as orthonormal rows; left ones (out, num_left) as columns,
    each times its singular value. The largest number of every direction is positive.
    """
    out_features, in_features = weight.shape
    num = max(num_right, num_left)
    if out_features > in_features:
        _, vectors = _top_eigh(gram_matrix(weight), num, name)
        right = vectors[:, :num_right]
        left = _times(weight, vectors[:, :num_left])
    else:
        values, vectors = _top_eigh(gram_matrix(weight.T), num, name)
        right = _orthonormal(_times(weight.T, vectors[:, :num_right]))
        left = vectors[:, :num_left] * values[:num_left].clamp(min=0).sqrt()
    return _signed(right).T.contiguous().float(), _signed(left).contiguous().float()


def _times(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return the product in float64, a slice of the matrix' rows at a time."""
    slices = torch.split(matrix, GRAM_ROWS)
    return torch.cat([rows.to(torch.float64) @ columns for rows in slices])


def _shared_directions(gram: Tensor, num_right: int, name: str) -> Tensor:
    _, vectors = _top_eigh(gram, num_right, name)
    return _signed(vectors).T.contiguous().float()


def _top_eigh(gram: Tensor, num: int, name: str) -> tuple[Tensor, Tensor]:
    """Return the ``num`` largest eigenvalues and their eigenvectors (columns), largest first."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise PartitionError(
            f"the svd for {name} did not converge ({error}); use --basis random"
        ) from error
    return values[-num:].flip(0), vectors[:, -num:].flip(1)


def _orthonormal(columns: Tensor) -> Tensor:
    """Scale orthogonal columns to length 1 or -1.

    Columns of no length, which a rank-deficient matrix has, become some direction left over.
    """
    lengths = columns.norm(dim=0)
    tiny = torch.finfo(columns.dtype).tiny
    basis: Tensor = torch.linalg.qr(columns / lengths.clamp(min=tiny))[0]
    return basis


def _signed(columns: Tensor) -> Tensor:
    """Flip columns so that each one's largest number is positive."""
    if columns.shape[1] == 0:
        return columns
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))
    return columns * torch.where(largest < 0, -1.0, 1.0)
