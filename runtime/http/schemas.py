"""The bodies of requests, as OpenAI's API reference has them.

Clients send many fields; those that are not here are ignored. ``null`` means not given. Types are
strict: a number in quotes is an error, because it is a mistake.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20


def _plain(text: str) -> str:
    if "\0" in text:
        raise ValueError("text must not hold null characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"not valid Unicode at character {error.start + 1}: send no halves of surrogate pairs"
        ) from error
    return text


def _as_list(prompt: object) -> object:
    """One prompt, text or token ids, becomes a list of one."""
    if isinstance(prompt, str):
        return [prompt]
    is_one = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
    return [prompt] if is_one else prompt


Text = Annotated[str, AfterValidator(_plain)]
TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]
StopTexts = Annotated[list[Text], Field(max_length=MAX_STOPS)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextPart(_Part):
    """One part of a message's content."""

    type: str
    text: Text | None = None

    @model_validator(mode="after")
    def _only_text(self) -> TextPart:
        if self.type != "text":
            raise ValueError(
                f"content of type {self.type[:40]!r} is not supported: this model reads text only"
            )
        if self.text is None:
            raise ValueError("a part of type 'text' needs its text")
        return self


class Message(_Part):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        """All of it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content)


class StreamOptions(_Part):
    """What a stream carries besides the answer; ``continuous_usage_stats`` is vLLM's name."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(_Part):
    """A schema that the answer has to follow."""

    name: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Part):
    """What kind of text the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type 'json_schema', and with no other")
        return self

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The schema of the answer; none for text."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.schema_


class GenerationRequest(_Part):
    """What both kinds of request have."""

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Text | StopTexts | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=1024
    )
    max_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _options_of_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1


class ChatRequest(GenerationRequest):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    modalities: list[str] | None = None

    @model_validator(mode="after")
    def _possible(self) -> ChatRequest:
        if self.max_tokens == 0:
            raise ValueError("max_tokens: should be at least 1")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        offered = "tools" if self.tools else "functions" if self.functions else None
        if offered is not None and self.tool_choice != "none":
            raise ValueError(
                f"{offered}: calling tools is not supported here; leave them out, or set "
                "tool_choice to 'none'"
            )
        if self.modalities is not None and self.modalities != ["text"]:
            raise ValueError("modalities: this model writes text only")
        return self


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    prompt: Annotated[
        list[Text | TokenIds],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_as_list),
    ]
    """Each text or token ids."""
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only with echo: true")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError("best_of: choosing among more answers than n is not supported")
        if self.suffix:
            raise ValueError("suffix: filling in between two texts is not supported")
        return self
