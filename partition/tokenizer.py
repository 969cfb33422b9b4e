"""The tokenizer the edge keeps, taken from whatever the model came in."""

from __future__ import annotations

from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint.base import Checkpoint
from privatelora.partition.checkpoint.gguf_header import GgufHeader, read_header
from privatelora.partition.files import os_errors

TOKENIZER_FILE = "tokenizer.json"

# Any of these is enough to build a tokenizer from; without one, some versions of transformers
# make up an empty tokenizer instead of failing.
_SOURCE_FILES = (TOKENIZER_FILE, "tokenizer.model", "vocab.json")

MAX_FILE_NBYTES = 128 << 20
"""Largest file that belongs to a tokenizer; the largest vocabularies take 35 MB."""

_TEXT_SUFFIXES = frozenset((".jinja", ".json", ".model", ".tiktoken", ".txt"))
_TEMPLATES = "additional_chat_templates"

# How byte-level vocabularies in GGUF cut text before merging. transformers knows these; for
# any other it would cut as GPT-2 does without a word, and give other tokens.
_KNOWN_SPLITS = ("gpt-2", "llama-bpe", "llama-v3", "llama3", "qwen2", "deepseek-r1-qwen", "tekken")


def export_tokenizer(checkpoint: Checkpoint, out_dir: Path) -> None:
    """Write the checkpoint's tokenizer as a Hugging Face tokenizer directory.

    ``tokenizer.json`` and ``tokenizer_config.json``, with the chat template in the latter or
    beside it; read back with ``load_tokenizer``. No code of the checkpoint is run. Raises
    PartitionError if there is no tokenizer, or none that gives the model's own tokens.
    """
    source = checkpoint.tokenizer_source
    if source.gguf_file is None:
        tokenizer = _from_directory(source.directory, checkpoint.source)
    else:
        tokenizer = _from_gguf(source.directory, source.gguf_file, checkpoint.source)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise PartitionError(
            f"{checkpoint.source}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{checkpoint.config.vocab_size}; they do not belong together"
        )
    for key in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        tokenizer.init_kwargs.pop(key, None)
    try:
        tokenizer.save_pretrained(out_dir)
    except OSError as error:
        raise PartitionError(f"cannot write the tokenizer to {out_dir} ({error})") from error
    if not (out_dir / TOKENIZER_FILE).is_file():
        raise PartitionError(f"{checkpoint.source}: its tokenizer has no {TOKENIZER_FILE} form")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load what ``export_tokenizer`` wrote; PartitionError if it is missing or damaged."""
    if not (directory / TOKENIZER_FILE).is_file():
        raise PartitionError(f"{directory} holds no {TOKENIZER_FILE}; partition the model again")
    _check_files(directory)
    try:
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            directory, local_files_only=True
        )
    except BaseException as error:  # tokenizers raises bare Exception for a damaged file
        _require_translatable(error)
        raise PartitionError(f"{directory}: the tokenizer is damaged ({_line(error)})") from error
    return tokenizer


def _from_directory(directory: Path, source: str) -> PreTrainedTokenizerBase:
    if not any((directory / name).is_file() for name in _SOURCE_FILES):
        raise PartitionError(
            f"{source} holds no tokenizer: expected one of {', '.join(_SOURCE_FILES)}"
        )
    # Its import takes a second, which only a partitioner needs to spend.
    from transformers import AutoTokenizer

    _check_files(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:  # tokenizers raises bare Exception for a damaged file
        _require_translatable(error)
        raise PartitionError(f"{source}: cannot load its tokenizer ({_line(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise PartitionError(f"{source}: its tokenizer has no {TOKENIZER_FILE} form")
    return tokenizer


def _from_gguf(directory: Path, file_name: str, source: str) -> PreTrainedTokenizerFast:
    header = read_header(directory / file_name, source)
    split = _split(header, source)
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            directory, gguf_file=file_name, local_files_only=True
        )
    except BaseException as error:  # a damaged vocabulary raises whatever it happens to lead to
        _require_translatable(error)
        raise PartitionError(f"{source}: cannot build its tokenizer ({_line(error)})") from error
    if split == "smollm":
        # SmolLM's own tokenizer cuts digits apart first; transformers cuts these as GPT-2.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    for name in ("bos", "eos"):
        stated = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        found = getattr(tokenizer, f"{name}_token_id")
        if stated is not None and found != stated:
            raise PartitionError(
                f"{source}: its {name} token is {stated}, transformers reads {found}; use the "
                "Hugging Face version of the model"
            )
    return tokenizer


def _split(header: GgufHeader, source: str) -> str | None:
    """How the vocabulary cuts text first; None for sentencepiece, which has one way only."""
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise PartitionError(f"{source} holds no tokenizer; use the Hugging Face version")
    if kind == "llama":
        return None
    split = header.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or not isinstance(split, str) or split not in (*_KNOWN_SPLITS, "smollm"):
        raise PartitionError(
            f"{source}: tokenizer {kind} with pre-tokenizer {split} is not supported; use the "
            "Hugging Face version of the model"
        )
    return split


def _check_files(directory: Path) -> None:
    """Refuse what transformers would wait for, or read without an end."""
    with os_errors(f"read {directory}"):
        for path in (*directory.iterdir(), *directory.glob(f"{_TEMPLATES}/*")):
            if path.is_dir():
                continue
            if not path.is_file():
                raise PartitionError(f"{path} is not a plain file")
            if path.suffix in _TEXT_SUFFIXES and path.stat().st_size > MAX_FILE_NBYTES:
                raise PartitionError(
                    f"{path} is larger than {MAX_FILE_NBYTES} bytes: no part of a tokenizer"
                )


def is_panic(error: BaseException) -> bool:
    """Whether Rust code panicked, as tokenizers does for a regular expression without an end.

    PyO3 makes that no Exception, so that programs end; a file of somebody else's must not do that.
    """
    return type(error).__name__ == "PanicException"


def _require_translatable(error: BaseException) -> None:
    if not isinstance(error, Exception) and not is_panic(error):
        raise error


def _line(error: BaseException) -> str:
    """First line of an exception's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
