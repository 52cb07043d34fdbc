"""Answers in the shapes of OpenAI's API: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reftune.serving.api.writing import Choice, Piece


@dataclass(frozen=True)
class Shape:
    """How one route writes its answers.

    Attributes:
        prefix: of answers' ids.
        whole: the `object` of an answer sent at once.
        chunk: the `object` of a piece.
    """

    prefix: str
    whole: str
    chunk: str

    @property
    def is_chat(self) -> bool:
        """Whether choices hold messages rather than text."""
        return self.prefix == "chatcmpl"


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk")
COMPLETION = Shape("cmpl", "text_completion", "text_completion")


@dataclass
class Answer:
    """One answer being sent: its head, and its choices as they come."""

    shape: Shape
    model: str
    prompt_tokens: int
    tokenizer: Any
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or f"{self.shape.prefix}-{uuid.uuid4().hex}"

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer sent at once."""
        shown = [self._choice(choice, choice.everything(), whole=True) for choice in choices]
        written = sum(len(choice.tokens) for choice in choices)
        return self._head(self.shape.whole) | {"choices": shown, "usage": self.usage(written)}

    def first(self, choice: Choice) -> dict[str, Any]:
        """The piece that begins a chat choice: its role."""
        shown = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return self._head(self.shape.chunk) | {"choices": [shown | {"finish_reason": None}]}

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """A piece of a choice."""
        return self._head(self.shape.chunk) | {"choices": [self._choice(choice, piece, whole=False)]}

    def last(self, written: int) -> dict[str, Any]:
        """The piece that holds the usage alone."""
        return self._head(self.shape.chunk) | {"choices": [], "usage": self.usage(written)}

    def usage(self, written: int) -> dict[str, int]:
        """Tokens read and written."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, choice: Choice, piece: Piece, whole: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"index": choice.index, "finish_reason": piece.finish, "logprobs": None}
        if self.shape.is_chat:
            message = {"role": "assistant", "content": piece.text} if whole else {"content": piece.text}
            found["message" if whole else "delta"] = message
        else:
            found["text"] = piece.text
        if choice.wants_logprobs:
            found["logprobs"] = self._chat_logprobs(piece) if self.shape.is_chat else self._text_logprobs(piece)
        return found

    def _chat_logprobs(self, piece: Piece) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

        content = [
            one(token.id, token.logprob or 0.0) | {"top_logprobs": [one(*other) for other in token.top]}
            for token in piece.tokens
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, piece: Piece) -> dict[str, Any]:
        texts = [self.tokenizer.decode([token.id]) for token in piece.tokens]
        offsets = [sum(map(len, texts[:index])) for index in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [{self.tokenizer.decode([i]): value for i, value in token.top} for token in piece.tokens],
            "text_offset": offsets,
        }


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"
