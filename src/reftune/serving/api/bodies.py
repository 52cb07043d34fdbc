"""Bodies of requests, checked field by field; a field that is not known is refused rather than ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from reftune.data.formats import Message

Tokens: TypeAlias = list[Annotated[int, Field(ge=0)]]


class Body(BaseModel):
    """What every body has in common: no unknown fields, numbers are numbers, texts are texts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _texts_are_unicode(cls, value: Any) -> Any:
        """A lone surrogate is no character: no tokenizer reads it, and it cannot be sent back."""
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"holds the lone surrogate {item[error.start]!a}, which is no character") from None
            elif isinstance(item, dict):
                pending += [*item, *item.values()]
            elif isinstance(item, list):
                pending += item
        return value


class Generation(Body):
    """How an answer is written; the fields and defaults of OpenAI's API, and `scale`, `top_k`, `repetition_penalty`."""

    model: str = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=0, le=1_000_000)
    n: int = Field(1, ge=1, le=16)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, gt=0, le=10, allow_inf_nan=False)
    scale: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)
    # Fields that clients send and that change no answer here.
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    parallel_tool_calls: Any = None

    @field_validator(
        "temperature", "top_p", "top_k", "n", "stream", "frequency_penalty", "presence_penalty", "repetition_penalty",
        "scale", mode="before",
    )  # fmt: skip
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or any(not 0 < len(stop) <= 256 for stop in stops):
            raise ValueError("at most 4 stop strings of 1 to 256 characters")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not token.isascii() or not token.isdigit() or not -100 <= bias <= 100:
                raise ValueError("keys are token ids, values lie between -100 and 100")
        return value

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def biases(self) -> dict[int, float]:
        """What is added to a token's logit, by token id."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}


class Part(BaseModel):
    """A part of a message's content; only text can be read here."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Any] | None = None

    def as_message(self) -> Message:
        """The turn as the templates of `data` take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return Message("system" if self.role == "developer" else self.role, text)


class Turn(Generation):
    """An answer in a conversation. Tools may be offered, and none is called: that choice is the model's."""

    tools: list[dict[str, Any]] | None = Field(None, max_length=1024)
    tool_choice: Literal["none", "auto"] | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _none_is_called(cls, value: Any) -> Any:
        if value not in (None, "none", "auto"):
            raise ValueError("no tools can be called here: leave it out, or send 'auto' or 'none'")
        return value


class ChatBody(Turn):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None

    @field_validator("response_format")
    @classmethod
    def _text_only(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value != {"type": "text"}:
            raise ValueError("only {'type': 'text'} can be had")
        return value

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to report beside each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class InputMessage(ChatMessage):
    """A turn of a response's input."""

    type: Literal["message"] = "message"

    @model_validator(mode="after")
    def _says_something(self) -> InputMessage:
        if self.content is None:
            raise ValueError("a message has content")
        return self


class ResponseBody(Turn):
    """`POST /v1/responses`. Nothing is kept, so the whole conversation stands in `input`."""

    input: str | list[InputMessage] = Field(min_length=1, max_length=10_000_000)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=1)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    text: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None

    @field_validator("previous_response_id", "conversation", mode="before")
    @classmethod
    def _nothing_is_kept(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("no answers are kept here: send the whole conversation as input")
        return value

    @field_validator("text")
    @classmethod
    def _plain_text(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if (value or {}).get("format") not in (None, {"type": "text"}):
            raise ValueError("only {'format': {'type': 'text'}} can be had")
        return value

    @property
    def messages(self) -> list[Message]:
        """The conversation, behind the instructions."""
        given = [Message("user", self.input)] if isinstance(self.input, str) else [m.as_message() for m in self.input]
        return given if self.instructions is None else [Message("system", self.instructions), *given]

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to report beside each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.include or self.top_logprobs else None


class CompletionBody(Generation):
    """`POST /v1/completions`."""

    prompt: str | list[str] | Tokens | list[Tokens]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = False
    suffix: None = None
    best_of: int | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to report beside each token; None for no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


class TokenizeBody(Body):
    """`POST /tokenize`: a text or messages, as the named model reads them."""

    model: str = Field(min_length=1, max_length=1024)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Tokens


class AdapterBody(Body):
    """`POST /v1/adapters`: serve one more adapter of the allowed folders under a name."""

    name: str
    path: str
