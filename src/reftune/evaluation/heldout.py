"""Held-out loss per supervised token and exact match, for the base model and the edited one on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from reftune.data.formats import Example
from reftune.evaluation.row_losses import RowLosses, row_losses
from reftune.inference.generation import Answer, GenerationSettings, generate_answers
from reftune.inference.loading import EditedModel


@dataclass(frozen=True)
class HeldOutScore:
    """What one model scores.

    Attributes:
        loss: mean negative log-likelihood of a supervised token (the completion and the token that ends it), in nats.
        perplexity: its exponential.
        exact_match: share of rows whose greedy answer equals the completion, whitespace aside; None if not generated.
        answers: the greedy answers, in the rows' order.
        tokens: supervised tokens.
    """

    loss: float
    perplexity: float
    exact_match: float | None
    tokens: int
    answers: list[str] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the answers."""
        return {name: value for name, value in asdict(self).items() if name != "answers"}


def evaluate_rows(
    edited: EditedModel,
    rows: Sequence[Example],
    settings: GenerationSettings,
    *,
    base: bool = False,
    generate: bool = True,
) -> HeldOutScore:
    """Score rows.

    Args:
        edited: the model.
        rows: prompts with completions.
        settings: batch size of both passes and length of the answers (always greedy).
        base: without the edit.
        generate: whether to answer too, which takes most of the time.
    """
    losses = held_out_losses(edited, rows, settings.batch_size, base=base)
    answers: list[Answer] | None = None
    if generate:
        greedy = GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
        answers = list(generate_answers(edited, rows, greedy, base=base))
    matches = (
        None if answers is None else [exact_match(a.text, r.completion) for a, r in zip(answers, rows, strict=True)]
    )
    return HeldOutScore(
        loss=losses.per_token,
        perplexity=math.exp(losses.per_token) if losses.per_token < 700 else math.inf,
        exact_match=None if matches is None else sum(matches) / len(matches),
        tokens=sum(losses.tokens),
        answers=None if answers is None else [answer.text for answer in answers],
    )


def exact_match(answer: str, completion: str) -> bool:
    """Whether the two are the same text, runs of whitespace counted as one space."""
    return answer.split() == completion.split()


def held_out_losses(edited: EditedModel, rows: Sequence[Example], batch_size: int, *, base: bool = False) -> RowLosses:
    """The loss of each row's completion, with or without the edit."""
    encoded = edited.encoding.dataset(rows)
    with edited.model.disable_adapter() if base else nullcontext():
        return row_losses(edited.model, encoded, int(edited.tokenizer.pad_token_id), batch_size)  # type: ignore[arg-type]
