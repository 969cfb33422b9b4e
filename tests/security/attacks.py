"""Attacks by a cloud that keeps what it is sent, or by who reads along. They succeed.

They use nothing but public parts of the model. Better ones exist: these are the simplest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from privatelora.partition.plan import Plan, Target

_BATCH = 512


def nearest(rows: Tensor, candidates: Tensor) -> Tensor:
    """For each of ``rows`` (n, d) the index of the nearest of ``candidates`` (m, d)."""
    return distances(rows, candidates).argmin(dim=1)


def distances(rows: Tensor, candidates: Tensor) -> Tensor:
    """Squared Euclidean distances (n, m), less what is the same for all candidates."""
    result: Tensor = candidates.square().sum(dim=1) - 2 * rows @ candidates.T
    return result


def fraction_equal(found: Tensor, true: list[int]) -> float:
    """How much of ``true`` was found."""
    return float((found == torch.tensor(true)).double().mean())


def solve(z: Tensor, y: Tensor) -> Tensor:
    """The M (rank_down, rank_up) with ``y = z M^T``, by least squares; smallest if many fit."""
    solution: Tensor = torch.linalg.lstsq(z.double(), y.double(), driver="gelsd").solution
    return solution.T.float()


def solve_all(
    exchanges: dict[int, tuple[Tensor, Tensor]], plan: Plan, num_pairs: int
) -> dict[tuple[int, Target], Tensor]:
    """Every M of the points that cost a round trip, from their first ``num_pairs`` pairs."""
    found: dict[tuple[int, Target], Tensor] = {}
    for point in plan.wire_points:
        z, y = (tensor[:num_pairs] for tensor in exchanges[point.index])
        parts = torch.split(y, plan.rank_down, dim=1)  # layer by layer, then target by target
        keys = [
            (layer, t) for layer in plan.span_in(point, plan.cloud_layers) for t in plan.targets
        ]
        for (layer, target), part in zip(keys, parts, strict=True):
            start = plan.block(target) * plan.rank_up
            found[layer, target] = solve(z[:, start : start + plan.rank_up], part)
    return found


def relative_error(
    found: dict[tuple[int, Target], Tensor], true: dict[tuple[int, Target], Tensor]
) -> float:
    """Norm of the difference over the norm of what it should be, over all M found."""
    wrong = sum(float((found[key] - true[key]).square().sum()) for key in found)
    size = sum(float(true[key].square().sum()) for key in found)
    return float((wrong / size) ** 0.5)


class PublicLayers:
    """Embedding and first layers of a public model, as anybody can run them, without any M."""

    def __init__(self, model: Any, num_layers: int) -> None:
        """``model``: transformers'."""
        self._model = model.model
        self._num_layers = num_layers

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """Hidden states (b, n, d) behind these layers, of tokens (b, n)."""
        seen: list[Tensor] = []
        layer = self._model.layers[self._num_layers]

        def stop(_module: Any, arguments: Any, keywords: Any) -> None:
            seen.append(arguments[0] if arguments else keywords["hidden_states"])
            raise _Enough

        hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._model(input_ids=ids, use_cache=False)
        except _Enough:
            return seen[0]
        finally:
            hook.remove()
        raise AssertionError("the model has no such layer")

    def dictionary(self, vocab_size: int, first_token: int) -> Tensor:
        """What each token becomes behind ``first_token``: (vocab_size, d)."""
        rows = []
        for start in range(0, vocab_size, _BATCH):
            tokens = torch.arange(start, min(start + _BATCH, vocab_size))
            pairs = torch.stack((torch.full_like(tokens, first_token), tokens), dim=1)
            rows.append(self(pairs)[:, 1])
        return torch.cat(rows)

    def follow(self, rows: Tensor, dictionary: Tensor, num_candidates: int) -> Tensor:
        """Token by token: what fits best behind those found so far, of the nearest in a table."""
        candidates = distances(rows, dictionary).topk(num_candidates, largest=False).indices
        found = torch.empty(0, dtype=torch.int64)
        for row, tokens in zip(rows, candidates, strict=True):
            tried = torch.cat((found.expand(num_candidates, -1), tokens[:, None]), dim=1)
            best = nearest(row[None], self(tried)[:, -1])
            found = torch.cat((found, tokens[best]))
        return found


class _Enough(Exception):
    """The layers behind are of no interest."""


@torch.inference_mode()
def next_tokens(model: Any, final: Tensor) -> Tensor:
    """What the public norm and LM head choose, (n,), for hidden states behind the last layer."""
    chosen: Tensor = model.lm_head(model.model.norm(final)).argmax(dim=1)
    return chosen


def labels_of(
    gradients: torch.Tensor,
    hidden_states: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    head: torch.Tensor,
) -> list[int]:
    """The tokens that training wanted, from the gradients of its loss.

    ``gradients``, ``hidden_states``: (n, hidden_size), of and before the final norm; ``norm`` and
    ``head`` are public. Cross-entropy's gradient is c (sum_y p_y J^T W_y - J^T W_label), in which
    only label and c are unknown, so the label is the one whose direction that is.
    """
    found = []
    for gradient, hidden in zip(gradients, hidden_states, strict=True):
        size = hidden.shape[0]
        root = hidden.pow(2).mean().add(eps).sqrt()
        weighted = head * norm
        through = weighted / root - torch.outer(weighted @ hidden, hidden) / (size * root**3)
        probabilities = torch.softmax(head @ (norm * hidden / root), 0)
        candidates = probabilities @ through - through
        found.append(int(torch.cosine_similarity(candidates, gradient.unsqueeze(0)).argmax()))
    return found
