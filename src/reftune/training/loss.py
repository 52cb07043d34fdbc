"""The completion loss: cross-entropy over supervised tokens, with transformers' normalisation and label smoothing."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100
"""The label of a token that is not learned, as everywhere in transformers."""


def completion_loss(
    logits: Float[Tensor, "*rows vocab"],
    targets: Int[Tensor, "*rows"],
    label_smoothing: float = 0.0,
    num_items_in_batch: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """(1 - e) * mean(-log p[target]) + e * mean(mean over the vocabulary of -log p), over targets that are not -100.

    Equal to transformers' ``ForCausalLMLoss`` (e = 0) and ``LabelSmoother`` (e > 0) once their shift by one is done:
    ``targets`` holds for each row of logits the token to be predicted there.

    Args:
        logits: scores, any floating type; half precision is raised to float32 first, float64 stays.
        targets: token ids, -100 where nothing is learned.
        label_smoothing: e, from 0 to 1.
        num_items_in_batch: what the sum is divided by: the number of supervised tokens of all micro-batches of one
            optimiser step, so that accumulated gradients equal those of one large batch. None: of this call.

    Returns:
        A scalar in float32 or float64. NaN where there is nothing to divide by, as in transformers.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    wanted = targets.to(scores.device).flatten()
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = functional.cross_entropy(
        scores, wanted, ignore_index=IGNORED_LABEL, reduction=reduction, label_smoothing=label_smoothing
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
