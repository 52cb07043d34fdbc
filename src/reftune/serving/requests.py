"""What an engine is asked, and what it gives back: the same words for the HTTP interface and for Python."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

Finish: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How one answer's tokens are chosen; each answer has its own.

    Attributes:
        temperature: 0 takes the likeliest token, above 0 samples.
        top_p: sample from the likeliest tokens that make up this share.
        top_k: sample from so many of the likeliest tokens; 0: from all.
        seed: of this answer's own generator; None: another each time.
        repetition_penalty: above 1 makes tokens of prompt and answer less likely (arXiv 1909.05858).
        frequency_penalty: taken from a token's logit for each time the answer holds it.
        presence_penalty: taken once where the answer holds it.
        logit_bias: added to logits, by token id.
        logprobs: report so many alternatives beside each token; None: no log-probabilities.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None


class Token(NamedTuple):
    """A written token: its id, its log-probability (before temperature) where wanted, and the likeliest ones."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


TokenStream: TypeAlias = AbstractAsyncContextManager[AsyncIterator[tuple[list[Token], Finish | None]]]
"""Leaving it cancels what is not written; its iterator gives new tokens, and at the end why it ended."""


@runtime_checkable
class TokenEngine(Protocol):
    """What the HTTP interface needs of an engine."""

    tokenizer: Any
    context: int
    vocabulary: int

    @property
    def alive(self) -> bool:
        """Whether it can write."""
        ...

    def start(self) -> None:
        """Begin to work."""
        ...

    def close(self) -> None:
        """End what has begun, then stop."""
        ...

    def statistics_help(self) -> dict[str, str]:
        """What each number of `statistics` is."""
        ...

    def statistics(self) -> dict[str, float]:
        """Numbers for `/metrics`."""
        ...

    def check(self, folder: Path) -> None:
        """Read an adapter; raise a `ReftuneError` where it cannot be served."""
        ...

    def edited(self, folders: Sequence[Path], length: int) -> list[int]:
        """Which tokens of a prompt of `length` tokens are edited."""
        ...

    async def submit(
        self,
        prompt: Sequence[int],
        *,
        adapters: Sequence[tuple[Path, float]],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> TokenStream:
        """Write an answer to `prompt` with the adapters of these folders, each with its strength."""
        ...
