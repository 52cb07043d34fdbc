"""Held-out loss per supervised token and exact match, for the base model and the edited one on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from reftune.data.collating import CompletionCollator
from reftune.data.formats import Example
from reftune.data.tokenising import encode_dataset
from reftune.inference.generation import Answer, GenerationSettings, generate_answers
from reftune.inference.loading import EditedModel
from reftune.training.loss import completion_loss
from reftune.training.prompt_ends import with_prompt_ends
from reftune.training.supervised_logits import supervised_forward, unsupported_reason


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
    loss, tokens = held_out_loss(edited, rows, settings.batch_size, base=base)
    answers: list[Answer] | None = None
    if generate:
        greedy = GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
        answers = list(generate_answers(edited, rows, greedy, base=base))
    matches = (
        None if answers is None else [exact_match(a.text, r.completion) for a, r in zip(answers, rows, strict=True)]
    )
    return HeldOutScore(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        exact_match=None if matches is None else sum(matches) / len(matches),
        tokens=tokens,
        answers=None if answers is None else [answer.text for answer in answers],
    )


def exact_match(answer: str, completion: str) -> bool:
    """Whether the two are the same text, runs of whitespace counted as one space."""
    return answer.split() == completion.split()


@torch.no_grad()
def held_out_loss(
    edited: EditedModel, rows: Sequence[Example], batch_size: int, *, base: bool = False
) -> tuple[float, int]:
    """Mean loss of a supervised token over all rows (not a mean of batch means), and the number of those tokens."""
    encoding, model = edited.encoding, edited.model
    encoded = encode_dataset(
        rows,
        edited.tokenizer,
        template=encoding.template,
        system_prompt=encoding.system_prompt,
        max_length=encoding.max_length,
        on_long_prompt=encoding.on_long_prompt,
    )
    collate = CompletionCollator(int(edited.tokenizer.pad_token_id))  # type: ignore[arg-type]
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    total, tokens = 0.0, 0
    every_logit = unsupported_reason(model) is not None
    with model.disable_adapter() if base else nullcontext():
        for start in range(0, len(by_length), batch_size):
            batch = collate([encoded[index] for index in by_length[start : start + batch_size]])
            inputs = with_prompt_ends(model, {name: value.to(model.device) for name, value in batch.items()})
            count = int((batch["labels"][:, 1:] != -100).sum())
            if every_logit:
                loss = float(model(**inputs).loss) * count
            else:
                found = supervised_forward(model, inputs)
                loss = float(completion_loss(found.logits, found.targets, num_items_in_batch=1))
            total, tokens = total + loss, tokens + count
    return total / max(tokens, 1), tokens
