"""Held-out loss row by row, for every method: what intervals and paired tests need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from reftune.data.collating import CompletionCollator
from reftune.training.prompt_ends import with_prompt_ends
from reftune.training.supervised_logits import (
    SupervisedLogitsError,
    shifted,
    supervised_forward,
    supervised_rows,
    unsupported_reason,
)

Reducing = Callable[[Any, dict[str, Any]], AbstractContextManager[dict[str, Any]]]
"""What prefix reuse makes of a batch: the arguments of a forward that gives the same logits."""


@dataclass(frozen=True)
class RowLosses:
    """The loss of each row.

    Attributes:
        sums: negative log-likelihood of a row's supervised tokens, in nats.
        tokens: their number.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def per_token(self) -> float:
        """Mean over all supervised tokens, in nats."""
        return sum(self.sums) / max(sum(self.tokens), 1)


@torch.no_grad()
def row_losses(
    model: Any, encoded: Any, pad_token_id: int, batch_size: int, reducing: Reducing | None = None
) -> RowLosses:
    """The loss of each encoded row, in their order; the model is in evaluation mode meanwhile.

    Args:
        model: a causal language model, plain or with any PEFT adapter.
        encoded: rows of `encode_dataset`.
        pad_token_id: the tokenizer's.
        batch_size: rows of one forward pass.
        reducing: a trainer's `prefixes.batch`, to take from its store what the edit leaves alone.
    """
    collate = CompletionCollator(pad_token_id)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    sums, tokens = [0.0] * len(encoded), [0] * len(encoded)
    every_logit = unsupported_reason(model) is not None
    try:
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            batch = collate([encoded[index] for index in indices])
            inputs = with_prompt_ends(model, {name: value.to(device) for name, value in batch.items()})
            with reducing(model, inputs) if reducing is not None else nullcontext(inputs) as arguments:
                try:
                    found = None if every_logit else _supervised(model, arguments)
                except SupervisedLogitsError:  # prompt tuning puts tokens before the row
                    found, every_logit = None, True
                losses, counts = found if found is not None else _whole(model, arguments)
            for index, loss, count in zip(indices, losses.tolist(), counts.tolist(), strict=True):
                sums[index], tokens[index] = float(loss), int(count)
    finally:
        model.train(was_training)
    return RowLosses(tuple(sums), tuple(tokens))


def _supervised(model: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    found = supervised_forward(model, arguments)
    return _by_row(found.logits[0], found.targets[0], _following(arguments))


def _whole(model: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    following = _following(arguments)
    outputs = model(**{name: value for name, value in arguments.items() if name not in ("labels", "shift_labels")})
    logits = outputs.logits[:, -following.shape[1] :]  # virtual tokens stand before the row
    rows, targets = supervised_rows(following)
    return _by_row(logits.flatten(0, 1).index_select(0, rows), targets, following)


def _following(arguments: Mapping[str, Any]) -> Int[Tensor, "batch sequence"]:
    """What each token is to predict, -100 where nothing."""
    return arguments["shift_labels"] if "shift_labels" in arguments else shifted(arguments["labels"])


def _by_row(
    logits: Float[Tensor, "supervised vocab"], targets: Int[Tensor, " supervised"], following: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums and counts of the rows of a batch, from logits at their supervised positions in order."""
    flat, _ = supervised_rows(following)
    row = (flat // following.shape[1]).to(logits.device)
    loss = functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").double()
    zeros = torch.zeros(len(following), dtype=torch.float64, device=logits.device)
    return zeros.index_add(0, row, loss), zeros.index_add(0, row, torch.ones_like(loss))
