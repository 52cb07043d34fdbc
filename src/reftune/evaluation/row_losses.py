"""Held-out loss row by row, for any causal language model: what means, intervals and paired tests are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from reftune.data.collating import CompletionCollator
from reftune.training.prompt_ends import with_prompt_ends
from reftune.training.supervised_logits import (
    SupervisedLogits,
    SupervisedLogitsError,
    shifted,
    supervised_forward,
    supervised_rows,
    unsupported_reason,
)

Forward = Callable[[Any, dict[str, Any]], SupervisedLogits]
"""Gives the supervised logits of a batch, as `supervised_forward` does."""


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
    model: Any, encoded: Any, pad_token_id: int, batch_size: int, forward: Forward = supervised_forward
) -> RowLosses:
    """The loss of each encoded row, in their order; the model is in evaluation mode meanwhile.

    Args:
        model: a causal language model, plain or with any PEFT adapter.
        encoded: rows of `encode_dataset`.
        pad_token_id: the tokenizer's.
        batch_size: rows of one forward pass.
        forward: a trainer's `prefixes.forward` takes from its store what the edit leaves alone.
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
            try:
                found = None if every_logit else forward(model, inputs)
            except SupervisedLogitsError:  # prompt tuning puts tokens before the row
                found, every_logit = None, True
            losses, counts = _by_row(found if found is not None else whole_logits(model, inputs), len(indices))
            for index, loss, count in zip(indices, losses.tolist(), counts.tolist(), strict=True):
                sums[index], tokens[index] = float(loss), int(count)
    finally:
        model.train(was_training)
    return RowLosses(tuple(sums), tuple(tokens))


def whole_logits(model: Any, inputs: Mapping[str, Any]) -> SupervisedLogits:
    """What `supervised_forward` gives, from every logit: for models that it does not take."""
    following = shifted(inputs["labels"])
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    logits = outputs.logits[:, -following.shape[1] :]  # virtual tokens stand before the row
    rows, targets = supervised_rows(following)
    chosen = logits.flatten(0, 1).index_select(0, rows).unsqueeze(0)
    return SupervisedLogits(chosen, targets.unsqueeze(0), rows // following.shape[1], outputs)


def _by_row(found: SupervisedLogits, count: int) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Sums and counts of the rows of a batch."""
    loss = functional.cross_entropy(found.logits[0].float(), found.targets[0], reduction="none").double()
    zeros = torch.zeros(count, dtype=torch.float64, device=loss.device)
    rows = found.rows.to(loss.device)
    return zeros.index_add(0, rows, loss), zeros.index_add(0, rows, torch.ones_like(loss))
