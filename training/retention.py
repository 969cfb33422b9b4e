"""Keeping what the base model knew: a term that holds training back, and a measure of success.

Both compare the trained model's next-token distributions with those of the base, on general
answers that the base wrote itself. The base is not kept for that: its final hidden states at the
answers' positions are computed once, before training, and go through a frozen copy of its LM head
whenever its distributions are needed. So it makes no difference how a model is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from privatelora.errors import ConfigError
from privatelora.runtime.link_config import ConfigPath, Settings
from privatelora.training.data.examples import Encoded
from privatelora.training.replay import Progress, device_of, evaluating, left_padded

CHUNK_NUMEL = 1 << 23
"""Largest tensor of float32 probabilities made at once, in numbers (32 MiB)."""
NUM_RESAMPLES = 2000

_Read = Callable[[Any, Tensor, Tensor, int], Tensor]


def _silent(done: int, total: int) -> None:
    pass


class FrozenHead:
    """The base model's LM head, on whichever device it is used."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take ``weight`` (vocab_size, hidden_size) and ``bias`` (vocab_size,)."""
        self._weight = weight
        self._bias = bias

    def log_probs(self, hidden_states: Tensor) -> Tensor:
        """Log-probabilities, float32 (n, vocab_size), of hidden states (n, hidden_size).

        Logits are computed in the head's dtype, as the model itself computes them.
        """
        device = hidden_states.device
        if self._weight.device != device:
            self._weight = self._weight.to(device)
            self._bias = None if self._bias is None else self._bias.to(device)
        logits = F.linear(hidden_states.to(self._weight.dtype), self._weight, self._bias)
        return torch.log_softmax(logits.float(), dim=-1)


@dataclass(frozen=True, slots=True)
class Reference:
    """General examples, and what the base model makes of them.

    ``examples``: each one's ``reference`` is its place in here. ``hidden_states``: (positions,
    hidden_size), on the CPU, in the dtype the base computes in: all examples' one after the other,
    for each answer token the final hidden state that predicts it, behind the last norm.
    """

    examples: tuple[Encoded, ...]
    hidden_states: Tensor
    head: FrozenHead

    def split(self) -> tuple[Tensor, ...]:
        """Hidden states by example: (num_answer, hidden_size) each, views."""
        return torch.split(self.hidden_states, [example.num_answer for example in self.examples])


class RetentionConfig(Settings):
    """How training is held back from ruining what the base model knew."""

    replay_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of each batch that is general text, at least one row; 0: nothing is held back."""
    kl_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Weight of KL(base || trained) on these rows, in nats per token, beside the ordinary loss."""
    num_replay: int = Field(default=240, gt=0)
    """General prompts that are replayed at most."""
    num_held_out: int = Field(default=80, gt=0)
    """General prompts, others, that retention is measured on at most."""
    max_answer_tokens: int = Field(default=64, gt=0)
    """Longest answer that the base model writes to a general prompt."""
    prompts: ConfigPath | None = None
    """General prompts of your own, one a line, or conversations with answers (.jsonl); every 4th is
    held out. Default: those that are part of this package."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of the base model is left, at the positions of answers that the base wrote.

    ``agreement``: share of positions where both find the same token most likely, with the ends of
    its 95 % interval. ``kl``: mean KL(base || trained) in nats.
    """

    agreement: float
    agreement_low: float
    agreement_high: float
    kl: float
    num_prompts: int
    num_positions: int


def final_hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """What the LM head reads at the last ``keep`` positions: (B, keep, hidden_size).

    ``model``: transformers', plain or wrapped by PEFT, or one that offers
    ``hidden_states(input_ids, attention_mask, keep)``.
    """
    states: Tensor
    if hasattr(model, "hidden_states"):
        states = model.hidden_states(input_ids, attention_mask, keep)
    else:
        decoder = _causal(model).base_model  # the layers and the last norm, without the LM head
        output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states = output.last_hidden_state[:, -keep:]
    return states


def frozen_head(model: Any) -> FrozenHead:
    """Return the LM head of a model as it is now.

    Weights that train, also as embeddings tied to it, are copied, others shared. ``model``:
    transformers', plain or wrapped by PEFT, or one whose ``lm_head`` is a tensor.
    """
    head = getattr(model, "lm_head", None)
    if isinstance(head, Tensor):
        return FrozenHead(_frozen(head), None)
    head = _causal(model).get_output_embeddings()
    head = getattr(head, "base_layer", head)  # inside PEFT's layer, if it has one
    bias = getattr(head, "bias", None)
    return FrozenHead(_frozen(head.weight), None if bias is None else _frozen(bias))


def build_reference(
    model: Any,
    encoded: Sequence[Encoded],
    *,
    batch_size: int = 8,
    progress: Progress = _silent,
) -> Reference:
    """Run a model that is still the base, its parameters already set to train or not.

    ``encoded``: general examples; their own ``reference`` is not looked at. Raises ConfigError for
    one without an answer, or without a token in front of it.
    """
    for number, example in enumerate(encoded):
        if not 0 < example.num_answer < len(example.input_ids):
            raise ConfigError(
                f"general example {number + 1} has {len(example.input_ids)} tokens, of which "
                f"{example.num_answer} are its answer; it needs an answer and a token before it"
            )
    if not encoded:
        raise ConfigError("there are no general examples; give at least one prompt")
    examples = tuple(replace(example, reference=i) for i, example in enumerate(encoded))
    states: dict[int, Tensor] = {}
    with evaluating(model):
        for batch in _batches(examples, batch_size):
            hidden = _forward(model, batch, final_hidden_states)
            for row, example in zip(hidden, batch, strict=True):
                states[example.reference] = _at_answer(row, example.num_answer).cpu()
            progress(len(states), len(examples))
    joined = torch.cat([states[index] for index in range(len(examples))])
    return Reference(examples, joined, frozen_head(model))


def kl_to_reference(
    logits: Tensor, batch: Mapping[str, Any], reference: Reference
) -> Tensor | None:
    """Mean KL(base || trained) in nats over the answer positions of a batch's general rows.

    ``logits``: (B, K, vocab_size) of the last K positions, the last one's included; K is more than
    the longest answer. ``batch["reference"]``: (B,) int64, the place of a row's example in
    ``reference``, or -1 for a row that is none. Float32, differentiable in ``logits``; None if no
    row is general. Besides a gradient of as many rows as there are positions, it needs memory for
    a few times ``CHUNK_NUMEL`` numbers.
    """
    by_example = reference.split()
    hidden: list[Tensor] = []
    rows: list[int] = []
    positions: list[int] = []
    for row, index in enumerate(batch["reference"].tolist()):
        if index < 0:
            continue
        num_answer = len(by_example[index])
        hidden.append(by_example[index])
        rows += [row] * num_answer
        # The last position's logits predict what comes behind the answer.
        positions += range(logits.shape[1] - 1 - num_answer, logits.shape[1] - 1)
    if not rows:
        return None
    at_answers = logits[rows, positions]
    states = torch.cat(hidden).to(logits.device)
    loss: Tensor = _MeanKL.apply(at_answers, states, reference.head)  # type: ignore[no-untyped-call]
    return loss


def measure_retention(model: Any, reference: Reference, *, batch_size: int = 8) -> Retention:
    """Compare a model with its base on general examples, best ones that it was not trained on.

    The interval is a bootstrap over prompts (2.5 and 97.5 percentiles of ``NUM_RESAMPLES``): the
    positions of one answer are not independent, so an interval that counts each of them, as
    Wilson's, would be too narrow. Neither random state nor mode of the model is changed.
    """
    by_example = reference.split()
    agreed = torch.zeros(len(reference.examples), dtype=torch.float64)
    kl = torch.zeros_like(agreed)
    with evaluating(model):
        for batch in _batches(reference.examples, batch_size):
            logits = _forward(model, batch, _logits)
            for row, example in zip(logits, batch, strict=True):
                index = example.reference
                trained = torch.log_softmax(_at_answer(row, example.num_answer).float(), dim=-1)
                base = reference.head.log_probs(by_example[index].to(trained.device))
                agreed[index] = (base.argmax(-1) == trained.argmax(-1)).sum()
                kl[index] = (base.exp() * (base - trained)).sum()
    counts = torch.tensor([example.num_answer for example in reference.examples])
    total = int(counts.sum())
    low, high = _bootstrap(agreed, counts)
    return Retention(
        agreement=float(agreed.sum()) / total,
        agreement_low=low,
        agreement_high=high,
        kl=float(kl.sum()) / total,
        num_prompts=len(counts),
        num_positions=total,
    )


class _MeanKL(torch.autograd.Function):
    """Mean of KL(base || trained) over n positions, without keeping probabilities for later.

    The gradient in the logits of a position is (q - p) / n, with q the trained model's
    probabilities and p the base's.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, hidden_states: Tensor, head: FrozenHead) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits)
        size = max(1, CHUNK_NUMEL // logits.shape[1])
        for start in range(0, len(logits), size):
            chunk = slice(start, start + size)
            base = head.log_probs(hidden_states[chunk])
            trained = torch.log_softmax(logits[chunk].float(), dim=-1)
            probs = base.exp()
            total += (probs * (base - trained)).sum()
            gradient[chunk] = trained.exp() - probs
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_outputs[0] / len(gradient)).to(gradient.dtype), None, None


def _frozen(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.requires_grad else tensor.detach()


def _causal(model: Any) -> Any:
    """The model with an LM head inside what PEFT may have wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _logits(model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    logits: Tensor = model(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep
    ).logits
    return logits


def _forward(model: Any, batch: Sequence[Encoded], read: _Read) -> Tensor:
    """What ``read`` gives at the last positions of a batch: (B, longest answer + 1, ...)."""
    keep = 1 + max(example.num_answer for example in batch)
    device = device_of(model)
    input_ids, attention_mask = left_padded([example.input_ids for example in batch])
    return read(model, input_ids.to(device), attention_mask.to(device), keep)


def _at_answer(row: Tensor, num_answer: int) -> Tensor:
    """The positions of a row (keep, ...) that predict its answer's tokens."""
    return row[len(row) - 1 - num_answer : len(row) - 1]


def _batches(examples: Sequence[Encoded], size: int) -> list[list[Encoded]]:
    """Batches of rows of similar length, which need little padding."""
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _bootstrap(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """95 % interval of sum(sums) / sum(counts) over resampled prompts."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(sums), (NUM_RESAMPLES, len(sums)), generator=generator)
    shares = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = torch.quantile(shares, shares.new_tensor([0.025, 0.975])).tolist()
    return low, high
