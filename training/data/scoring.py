"""Are the answers right? Asked of a model in memory, or of answers that came from elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from privatelora.training.data.config import EncodingConfig
from privatelora.training.data.encode import DEFAULT, prompt_to_ids
from privatelora.training.data.examples import Example

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_Z_95 = 1.959964


@dataclass(frozen=True)
class Score:
    """How many answers are right. ``ci_low``, ``ci_high``: 95 % interval of ``accuracy``."""

    num: int
    num_right: int
    answers: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / self.num

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (Wilson 1927, JASA 22): it holds near 0 and 1 too."""
        n, p, z = self.num, self.accuracy, _Z_95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # The accuracy lies within, whatever is rounded.
        return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))

    def summary(self) -> dict[str, float | int]:
        """Everything but the answers."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "ci_low": low, "ci_high": high, "num": self.num}

    def details(self) -> dict[str, Any]:
        """Everything: what was answered, in the order of the examples."""
        return {**self.summary(), "answers": list(self.answers)}


def score_answers(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Compare answers, wherever they come from, with the right ones."""
    right = sum(is_right(a, example) for a, example in zip(answers, examples, strict=True))
    return Score(len(examples), right, tuple(answers))


def is_right(answer: str, example: Example) -> bool:
    """Whether an answer is the right one.

    Numbers: the last one in it (after ``####`` in GSM8K's answers, too) has the same value. Texts:
    equal but for case, repeated spaces, and punctuation at the end.
    """
    if example.compare == "number":
        found, meant = _NUMBER.findall(answer), _NUMBER.findall(example.answer)
        return bool(found and meant) and _value(found[-1]) == _value(meant[-1])
    return _normal(answer) == _normal(example.answer)


def score_generated(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    settings: EncodingConfig = DEFAULT,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Ask greedily, and score.

    ``model``: transformers', or anything called as these are; its mode is left as it was.
    ``max_new_tokens``: where an answer is cut off.
    """
    prompts = [prompt_to_ids(example, tokenizer, settings) for example in examples]
    # Prompts of like length together, so that few rows are padded.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for i, ids in zip(
                chosen,
                _generate(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens),
                strict=True,
            ):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                answers[i] = text.rstrip("\ufffd").strip()  # cut off within a character
            progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
    return score_answers(answers, examples)


@torch.no_grad()
def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations, each up to its end of turn."""
    length = max(map(len, prompts))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    if hasattr(model, "generate"):
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=end,
        )[:, length:]
    else:
        for _ in range(max_new_tokens):
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if bool((ids[:, length:] == end).any(dim=1).all()):
                break
        found = ids[:, length:]
    rows = found.tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!?,;: ")
