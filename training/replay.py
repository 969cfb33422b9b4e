"""General examples to replay: answers of the base model itself, made offline and kept in a file.

They show what the base would say where nothing was to be learnt. Answers are drawn from the
model's own distribution (temperature 1): then cross-entropy on them is, on average, KL(base ||
trained) plus a constant, with its minimum at the base itself. A lower temperature would teach the
model to be surer than it was, and greedy answers of a small model run into loops.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, StrictInt
from torch import Tensor

from privatelora.errors import ConfigError
from privatelora.partition.files import PRIVATE_MODE, write_atomic
from privatelora.plain_file import open_plain
from privatelora.training.data.config import EncodingConfig
from privatelora.training.data.encode import prompt_to_ids
from privatelora.training.data.examples import Encoded, ask

FORMAT = "privatelora-general-answers"
FORMAT_VERSION = 1
HELD_OUT_EVERY = 4
"""The 4th, 8th, 12th ... prompt of a file measures what is kept and is never replayed."""
MAX_FILE_NBYTES = 64 << 20
MAX_PROMPTS = 100_000

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with how many are done, and how many there are."""


def _silent(done: int, total: int) -> None:
    pass


class GeneralAnswer(BaseModel):
    """A prompt, and how the base model answered.

    ``token_ids``: the answer as it was sampled, at least one; it ends with the token that ends a
    turn, unless it was cut off. ``answer`` is its text, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    answer: str
    token_ids: tuple[StrictInt, ...]


def read_prompts(path: Path | None = None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the prompts to replay, and those held out, of a text file with one a line.

    Every :data:`HELD_OUT_EVERY`-th is held out; empty lines are skipped. None: the 320 that are
    part of this package, 16 of each kind, of which 240 are replayed and 80 held out. Raises
    ConfigError.
    """
    if path is None:
        where = "general_prompts.txt"
        data = files("privatelora.training.data").joinpath(where).read_bytes()
    else:
        where, data = str(path), _read(path)
    try:
        lines = [line.strip() for line in data.decode().splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text; put one prompt on each line") from error
    prompts = [line for line in lines if line]
    if not HELD_OUT_EVERY <= len(prompts) <= MAX_PROMPTS:
        raise ConfigError(
            f"{where} holds {len(prompts)} prompts, one a line; give {HELD_OUT_EVERY} to "
            f"{MAX_PROMPTS}"
        )
    return split_held_out(prompts)


def split_held_out(items: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Return what is replayed, and what measures: every :data:`HELD_OUT_EVERY`-th."""
    held_out = items[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    rest = [item for number, item in enumerate(items, start=1) if number % HELD_OUT_EVERY]
    return tuple(rest), tuple(held_out)


def generate_general(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = _silent,
) -> list[GeneralAnswer]:
    """Let the model answer each prompt, each a conversation of its own.

    ``model``: transformers', or anything called as these are; one without ``generate`` computes
    the whole text again for every token. ``temperature`` 0: the most likely tokens. Neither the
    random state of the process nor the model's mode is changed.
    """
    stops = stop_ids(model, tokenizer)
    answers: list[GeneralAnswer] = []
    with evaluating(model), _seeded(seed, model):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            input_ids, attention_mask = left_padded([prompt_ids(tokenizer, p) for p in batch])
            device = device_of(model)
            sample = _generate if hasattr(model, "generate") else _sample
            sampled = sample(
                model,
                input_ids.to(device),
                attention_mask.to(device),
                max_new_tokens,
                temperature,
                stops,
            )
            for prompt, row in zip(batch, sampled.tolist(), strict=True):
                token_ids = _until_stop(row, stops)
                answer = str(tokenizer.decode(token_ids, skip_special_tokens=True))
                answers.append(
                    GeneralAnswer(prompt=prompt, answer=answer, token_ids=tuple(token_ids))
                )
            progress(len(answers), len(prompts))
    return answers


def cached_general(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    cache: Path,
    model_fingerprint: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = _silent,
) -> list[GeneralAnswer]:
    """Return what :func:`generate_general` gives, from a file in ``cache`` if there is one.

    The file is JSONL: what it was made of, then an answer a line. One that is damaged, or of other
    prompts, settings or another model, is not used; a new one is written whole or not at all.
    Raises PartitionError if it cannot be written.
    """
    made_of: dict[str, object] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_fingerprint": model_fingerprint,
        "prompts_sha256": _sha256("\n".join(prompts)),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    key = _sha256(json.dumps(made_of, sort_keys=True))
    path = cache / f"general-{key[:16]}.jsonl"
    answers = _read_cache(path, made_of)
    if answers is None:
        answers = generate_general(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        content = _content(answers)
        first = json.dumps(made_of | {"answers_sha256": _sha256(content)})
        write_atomic(path, f"{first}\n{content}".encode(), PRIVATE_MODE)
    return answers


def encode_general(answers: Sequence[GeneralAnswer], tokenizer: Any) -> list[Encoded]:
    """Token ids of the conversations, exactly those that were sampled."""
    return [
        Encoded(
            input_ids=(*prompt_ids(tokenizer, answer.prompt), *answer.token_ids),
            num_answer=len(answer.token_ids),
        )
        for answer in answers
    ]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a conversation that starts with ``prompt``, up to where the answer begins.

    A model without a chat template gets the prompt as a line of text. Raises ConfigError if the
    template refuses it.
    """
    if tokenizer.chat_template is None:
        return prompt_to_ids(ask(f"{prompt}\n", ""), tokenizer, EncodingConfig(render="text"))
    return prompt_to_ids(ask(prompt, "", where=f"prompt {prompt[:40]!r}"), tokenizer)


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer, ascending."""
    found = {tokenizer.eos_token_id}
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [ids])
    return tuple(sorted(found - {None}))


def _generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    temperature: float,
    stops: tuple[int, ...],
) -> Tensor:
    """Sample with transformers: ids (B, n) of the answers, ``stops[0]`` behind their end."""
    from transformers import GenerationConfig

    chance: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        chance = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=list(stops),
        pad_token_id=stops[0] if stops else 0,
        **chance,
    )
    sequences = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, generation_config=config
    )
    answers: Tensor = sequences[:, input_ids.shape[1] :]
    return answers


def _sample(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    temperature: float,
    stops: tuple[int, ...],
) -> Tensor:
    """As ``_generate``, for a model that has only a forward pass."""
    num_prompt = input_ids.shape[1]
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        output = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        if temperature > 0:
            token = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
        else:
            token = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(token)], dim=1)
        ended |= torch.isin(token.squeeze(1), token.new_tensor(stops))
        if bool(ended.all()):
            break
    return input_ids[:, num_prompt:]


def _until_stop(row: list[int], stops: tuple[int, ...]) -> list[int]:
    """Tokens up to the first that ends an answer, with it."""
    for number, token in enumerate(row, start=1):
        if token in stops:
            return row[:number]
    return row


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 (B, T), with T that of the longest row."""
    length = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, length - len(row) :] = torch.tensor(row)
        attention_mask[number, length - len(row) :] = 1
    return input_ids, attention_mask


def device_of(model: Any) -> torch.device:
    """Where a model's inputs have to be."""
    parameter: Tensor = next(model.parameters())
    return parameter.device


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout and no gradients inside the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _seeded(seed: int, model: Any) -> Iterator[None]:
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _read(path: Path) -> bytes:
    try:
        with open_plain(path) as file:
            data = file.read(MAX_FILE_NBYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_NBYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_NBYTES >> 20} MiB; give fewer prompts")
    return data


def _content(answers: Sequence[GeneralAnswer]) -> str:
    """The answers, a line of JSON each."""
    return "".join(json.dumps(answer.model_dump(), ensure_ascii=False) + "\n" for answer in answers)


def _read_cache(path: Path, made_of: dict[str, object]) -> list[GeneralAnswer] | None:
    """Return the answers in a file; None if there is none that is whole and made of this."""
    if not path.exists():
        return None
    try:
        first, _, content = _read(path).decode().partition("\n")
        if json.loads(first) != made_of | {"answers_sha256": _sha256(content)}:
            return None
        # Not splitlines: the text of an answer may hold other ends of lines than this one.
        return [GeneralAnswer.model_validate_json(line) for line in content.split("\n")[:-1]]
    except (ConfigError, ValueError, RecursionError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
