"""One answer being written: tokens come in, text goes out, up to a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream

from reftune.serving.requests import Finish, Token


@dataclass
class Piece:
    """What is new in a choice.

    Attributes:
        text: as far as no stop string can begin in it.
        tokens: the tokens behind it.
        finish: why the choice has ended; None while it goes on.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None


class Choice:
    """One of a request's answers.

    Args:
        index: its number.
        tokenizer: of the adapter.
        stops: strings that end it; they are not part of the text.
        wants_logprobs: whether tokens are reported with their log-probabilities.
        ends: token ids that end it, besides the engine's own.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Any,
        stops: Sequence[str] = (),
        wants_logprobs: bool = False,
        ends: Collection[int] = (),
    ):
        self.index = index
        self.stops, self.ends = list(stops), ends
        self.wants_logprobs = wants_logprobs
        self.tokens: list[Token] = []
        self.text = ""
        self.finish: Finish | None = None
        self._tokenizer = tokenizer
        self._decode = DecodeStream([], skip_special_tokens=True)
        self._sent = 0
        self._pending: list[Token] = []

    def take(self, tokens: Sequence[Token], finish: Finish | None) -> Piece:
        """Add tokens, and say what can be sent; a stop string in them ends the choice.

        Args:
            tokens: the new ones.
            finish: why the engine ended here, or None.
        """
        for token in tokens:
            self.tokens.append(token)
            self._pending.append(token)
            begin = max(0, len(self.text) - max(map(len, self.stops), default=0))
            self.text += self._decode.step(self._tokenizer.backend_tokenizer, token.id) or ""
            found = [at for stop in self.stops if (at := self.text.find(stop, begin)) >= 0]
            if found:
                self.text, self.finish = self.text[: min(found)], "stop"
            if found or token.id in self.ends:
                finish = "stop"
                break
        if finish is not None and self.finish is None:
            self.finish = finish
            ids = [token.id for token in self.tokens]
            whole = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if whole.startswith(self.text):  # bytes of a character that was never finished
                self.text = whole
        ready = len(self.text) - (0 if self.finish else self._held_back())
        text, self._sent = self.text[self._sent : ready], max(ready, self._sent)
        sent, self._pending = self._pending, []
        return Piece(text, sent, self.finish)

    def everything(self) -> Piece:
        """The whole choice."""
        return Piece(self.text, self.tokens, self.finish)

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (size for stop in self.stops for size in range(1, len(stop)) if self.text.endswith(stop[:size])), default=0
        )
