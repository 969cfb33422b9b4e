"""Conversations in words over a language model in tokens."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from typing import Literal, TypedDict

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from privatelora.errors import PartitionError, RequestError
from privatelora.partition.tokenizer import is_panic
from privatelora.runtime.generation import Context, GenerationStats, generate_text
from privatelora.runtime.language_model import LanguageModel
from privatelora.runtime.sampling_params import SamplingParams

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_BYTE_LEVEL = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
"""How tokenizers of GPT-2's kind write bytes."""


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class TextModel:
    """A language model with its tokenizer: text in, a stream of text out."""

    def __init__(self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise PartitionError("the tokenizer has no tokenizer.json form, which streaming needs")
        self.model = model
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        stops = {*model.config.eos_token_ids, tokenizer.eos_token_id} - {None}
        self.eos_ids = tuple(sorted(stops))

    def encode_chat(self, messages: Seq[ChatMessage]) -> list[int]:
        """Prompt tokens for the assistant's next turn, by the model's own chat template."""
        if self._tokenizer.chat_template is None:
            raise RequestError(
                "this model has no chat template; send a plain prompt instead of messages"
            )
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, and may refuse in its own words
            raise RequestError(
                f"the model's chat template refuses these messages: {error}"
            ) from error
        # The template writes the special tokens itself.
        return self.encode_prompt(str(text), add_special_tokens=False)

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of plain text to be continued; RequestError if it is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt is not valid Unicode at character {error.start + 1}: send UTF-8, and "
                "no halves of surrogate pairs"
            ) from error
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except BaseException as error:
            if not is_panic(error):
                raise
            raise RequestError(
                f"the model's tokenizer cannot take this text apart: {error}"
            ) from error

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's own."""
        return self._tokenizer

    def decode(self, token_ids: Seq[int]) -> str:
        """Text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """Text of one token, special ones included; part of a character is a replacement sign."""
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for, which may be a part of a character only."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""  # models may have more rows than there are tokens
        if token_id in self._tokenizer.added_tokens_decoder:
            return token.encode()
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes([int(byte[1], 16)])
        if self._is_byte_level:
            return bytes(_BYTE_LEVEL[character] for character in token)
        return self.token_text(token_id).encode()

    def stream(
        self,
        context: Context,
        prompt_ids: Seq[int],
        params: SamplingParams,
        stats: GenerationStats,
    ) -> AsyncGenerator[str, None]:
        """Yield the answer's text; closing the iterator cancels it and keeps ``context``."""
        return generate_text(
            context, self._tokenizer.backend_tokenizer, prompt_ids, params, self.eos_ids, stats
        )
