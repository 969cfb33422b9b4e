"""Conversations in words over a language model in tokens."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from typing import Literal, TypedDict

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from privatelora.errors import PartitionError, PrivateLoRAError, RequestError
from privatelora.runtime.generation import Context, GenerationStats, generate_text
from privatelora.runtime.language_model import LanguageModel
from privatelora.runtime.sampling_params import SamplingParams


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
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

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


class Conversation:
    """One sequence kept open over several prompts, so that only what is new is computed.

    It is opened when first needed, and again after a failure: the next prompt then pays for
    its whole text once.
    """

    def __init__(self, text: TextModel) -> None:
        self._text = text
        self._context: Context | None = None

    async def stream(
        self, prompt_ids: Seq[int], params: SamplingParams, stats: GenerationStats
    ) -> AsyncGenerator[str, None]:
        """Yield the answer to a whole prompt; see ``TextModel.stream``."""
        try:
            if self._context is None:
                self._context = await Context.open(self._text.model)
            pieces = self._text.stream(self._context, prompt_ids, params, stats)
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    yield piece
        except RequestError:
            raise
        except PrivateLoRAError:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Free the sequence. May be repeated."""
        if self._context is not None:
            context, self._context = self._context, None
            await context.aclose()
