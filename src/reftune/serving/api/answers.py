"""Answers in the shapes of OpenAI's API: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reftune.serving.api.errors import RequestError
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


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk")
COMPLETION = Shape("cmpl", "text_completion", "text_completion")
RESPONSE = Shape("resp", "response", "response")


class Answer(ABC):
    """One answer being sent: whole, or as events of which each is sent as soon as it is there.

    Args:
        shape: how its route writes.
        body: what was asked.
        prompt_tokens: read.
        tokenizer: of the adapter.
    """

    def __init__(self, shape: Shape, body: Any, prompt_tokens: int, tokenizer: Any):
        self.shape, self.body, self.prompt_tokens, self.tokenizer = shape, body, prompt_tokens, tokenizer
        self.id, self.created = f"{shape.prefix}-{uuid.uuid4().hex}", int(time.time())

    @abstractmethod
    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer sent at once."""

    @abstractmethod
    def begins(self, choice: Choice) -> list[dict[str, Any]]:
        """What comes before a choice's first piece."""

    @abstractmethod
    def pieces(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """What a piece of a choice is sent as; nothing, if there is nothing to be seen of it."""

    @abstractmethod
    def ends(self, written: int) -> list[dict[str, Any]]:
        """What comes after the last piece, of so many tokens."""

    @abstractmethod
    def fails(self, error: RequestError) -> list[dict[str, Any]]:
        """What comes in place of the rest."""

    def sent(self, data: dict[str, Any]) -> str:
        """A server-sent event."""
        return event(data)

    @property
    def done(self) -> str:
        """What says that no event follows."""
        return DONE

    def logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece's tokens with their log-probabilities, as chats and responses report them."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

        return [
            one(token.id, token.logprob or 0.0) | {"top_logprobs": [one(*other) for other in token.top]}
            for token in piece.tokens
        ]


class Choices(Answer):
    """`/v1/chat/completions` and `/v1/completions`: choices of messages or of text."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer sent at once."""
        shown = [self._choice(choice, choice.everything(), whole=True) for choice in choices]
        written = sum(len(choice.tokens) for choice in choices)
        return self._head(self.shape.whole) | {"choices": shown, "usage": self._usage(written)}

    def begins(self, choice: Choice) -> list[dict[str, Any]]:
        """The role, of a chat's choice."""
        if self.shape is not CHAT:
            return []
        shown = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return [self._head(self.shape.chunk) | {"choices": [shown | {"finish_reason": None}]}]

    def pieces(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """A chunk."""
        if not (piece.text or piece.finish or choice.wants_logprobs):
            return []
        return [self._head(self.shape.chunk) | {"choices": [self._choice(choice, piece, whole=False)]}]

    def ends(self, written: int) -> list[dict[str, Any]]:
        """The usage alone, where it is wanted."""
        wanted = (self.body.stream_options or {}).get("include_usage")
        return [self._head(self.shape.chunk) | {"choices": [], "usage": self._usage(written)}] if wanted else []

    def fails(self, error: RequestError) -> list[dict[str, Any]]:
        """The error."""
        return [error.body()]

    def _usage(self, written: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}

    def _choice(self, choice: Choice, piece: Piece, whole: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"index": choice.index, "finish_reason": piece.finish, "logprobs": None}
        if self.shape is CHAT:
            message = {"role": "assistant", "content": piece.text} if whole else {"content": piece.text}
            found["message" if whole else "delta"] = message
        else:
            found["text"] = piece.text
        if choice.wants_logprobs:
            chat = self.shape is CHAT
            found["logprobs"] = (
                {"content": self.logprobs(piece), "refusal": None} if chat else self._text_logprobs(piece)
            )
        return found

    def _text_logprobs(self, piece: Piece) -> dict[str, Any]:
        texts = [self.tokenizer.decode([token.id]) for token in piece.tokens]
        offsets = [sum(map(len, texts[:index])) for index in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [{self.tokenizer.decode([i]): value for i, value in token.top} for token in piece.tokens],
            "text_offset": offsets,
        }


class ResponseAnswer(Answer):
    """`/v1/responses`: one message, whose events say at each step what is being written."""

    def __init__(self, shape: Shape, body: Any, prompt_tokens: int, tokenizer: Any):
        super().__init__(shape, body, prompt_tokens, tokenizer)
        self._item = f"msg-{uuid.uuid4().hex}"
        self._number = 0
        self._choice: Choice | None = None

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer sent at once."""
        (choice,) = choices
        return self._response(choice)

    def begins(self, choice: Choice) -> list[dict[str, Any]]:
        """The response, its message, and the message's text, all empty."""
        self._choice = choice
        opened = self._response(None)
        message = self._message([], "in_progress")
        return [
            {"type": "response.created", "response": opened},
            {"type": "response.in_progress", "response": opened},
            {"type": "response.output_item.added", "output_index": 0, "item": message},
            self._of_text("response.content_part.added", part=self._text("", [])),
        ]

    def pieces(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """What was written now."""
        logprobs = self.logprobs(piece) if choice.wants_logprobs else []
        if not piece.text and not logprobs:
            return []
        return [self._of_text("response.output_text.delta", delta=piece.text, logprobs=logprobs)]

    def ends(self, written: int) -> list[dict[str, Any]]:
        """Text, message and response, each as a whole."""
        assert self._choice is not None
        part = self._part(self._choice)
        response = self._response(self._choice)
        return [
            self._of_text("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
            self._of_text("response.content_part.done", part=part),
            {"type": "response.output_item.done", "output_index": 0, "item": response["output"][0]},
            {"type": f"response.{response['status']}", "response": response},
        ]

    def fails(self, error: RequestError) -> list[dict[str, Any]]:
        """A failed response."""
        said = error.body()["error"]
        failed = {"code": said["code"] or "server_error", "message": said["message"]}
        return [{"type": "response.failed", "response": self._response(None) | {"status": "failed", "error": failed}}]

    def sent(self, data: dict[str, Any]) -> str:
        """An event with its name and number."""
        numbered = data | {"sequence_number": self._number}
        self._number += 1
        return f"event: {data['type']}\n{event(numbered)}"

    @property
    def done(self) -> str:
        """Nothing: the last event says it."""
        return ""

    def _of_text(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self._item, "output_index": 0, "content_index": 0, **more}

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _part(self, choice: Choice) -> dict[str, Any]:
        everything = choice.everything()
        return self._text(everything.text, self.logprobs(everything) if choice.wants_logprobs else [])

    def _message(self, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, choice: Choice | None) -> dict[str, Any]:
        """As it is before (None) or after the choice is written."""
        cut = choice is not None and choice.finish == "length"
        status = "in_progress" if choice is None else "incomplete" if cut else "completed"
        body, written = self.body, 0 if choice is None else len(choice.tokens)
        usage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + written,
        }
        return {
            "id": self.id, "object": self.shape.whole, "created_at": self.created, "model": body.model,
            "status": status,
            "output": [] if choice is None else [self._message([self._part(choice)], status)],
            "usage": None if choice is None else usage, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "temperature": body.temperature, "top_p": body.top_p, "top_logprobs": body.top_logprobs or 0,
            "tools": [], "tool_choice": "none", "parallel_tool_calls": False, "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}}, "truncation": "disabled",
        }  # fmt: skip


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"
