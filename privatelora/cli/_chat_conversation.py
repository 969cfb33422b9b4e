"""A conversation as ``privatelora chat`` holds it: its text, who answers, and how."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from privatelora.errors import RequestError

if TYPE_CHECKING:
    from privatelora.runtime.chat import ChatMessage
    from privatelora.runtime.edge_service import EdgeService
    from privatelora.runtime.generation import GenerationStats
    from privatelora.runtime.sampling_params import SamplingParams

Messages = list["ChatMessage"]


class ChatConversation:
    """Turns of a user and a model, who may change: only text is kept from turn to turn.

    ``model``: name of the one that answers next. ``system_prompt``: what goes before everything.
    ``messages``: users' and answers, in turn.
    """

    def __init__(self, service: EdgeService) -> None:
        self.service = service
        self.model = service.default_model
        self.system_prompt = service.system_prompt
        self.messages: Messages = []
        self._unanswered: Messages | None = None
        """As ``messages``, with the last question, if that got no answer."""
        self._sampling: dict[str, Any] = {}

    @property
    def params(self) -> SamplingParams:
        """How the next answer is sampled."""
        return self.service.params(self._sampling)

    def switch(self, model: str) -> None:
        """Let another model answer from now on; UnknownModel if there is none of that name."""
        self.service.text(model)
        self.model = model

    def set_sampling(self, name: str, value: Any) -> None:
        """Sample with ``value`` from now on; RequestError if it is not one for ``name``."""
        sampling = self._sampling | {name: value}
        self.service.params(sampling)
        self._sampling = sampling

    def reset_sampling(self, name: str) -> None:
        """Sample as the edge's settings say from now on."""
        self._sampling.pop(name, None)

    def asking(self, question: str) -> Messages:
        """The conversation with one more question, to be answered."""
        return [*self.messages, {"role": "user", "content": question}]

    def asking_again(self) -> Messages:
        """The conversation up to its last question; RequestError if there is none."""
        if self._unanswered is not None:
            return self._unanswered
        end = self._start_of_last_turn() + 1
        return self.messages[:end]

    def undo(self) -> str:
        """Forget the last question and its answer; the question, or RequestError."""
        if self._unanswered is not None:
            question = self._unanswered[-1]["content"]
            self._unanswered = None
            return question
        start = self._start_of_last_turn()
        question = self.messages[start]["content"]
        del self.messages[start:]
        return question

    def begin_anew(self) -> None:
        """Forget all turns."""
        self.replace([])

    def replace(self, messages: Sequence[ChatMessage]) -> None:
        """Go on from another conversation."""
        self.messages = list(messages)
        self._unanswered = None

    def with_system_prompt(self, messages: Sequence[ChatMessage]) -> Messages:
        """``messages`` as a model gets them."""
        if self.system_prompt is None:
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    async def answer(
        self, asked: Messages, show: Callable[[str], None], stats: GenerationStats
    ) -> None:
        """Answer ``asked``, giving each piece of text to ``show`` as it comes.

        An answer that is cancelled or fails is kept as far as it came. One of which nothing came
        leaves the conversation as it was; it can be asked again. Raises what ``stream`` of the
        service raises.
        """
        service = self.service
        pieces: list[str] = []
        self._unanswered = asked
        try:
            prompt_ids = service.text(self.model).encode_chat(self.with_system_prompt(asked))
            stream = service.stream(self.model, prompt_ids, self.params, stats)
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    pieces.append(piece)
                    show(piece)
        finally:
            if pieces:
                self.replace([*asked, {"role": "assistant", "content": "".join(pieces)}])

    def _start_of_last_turn(self) -> int:
        for index in reversed(range(len(self.messages))):
            if self.messages[index]["role"] == "user":
                return index
        raise RequestError("nothing was asked yet")
