"""The losses: cross-entropy over supervised tokens as transformers has it, and a preference between two answers."""

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


def row_log_probs(
    logits: Float[Tensor, "1 supervised vocab"],
    targets: Int[Tensor, "1 supervised"],
    rows: Int[Tensor, " supervised"],
    count: int,
) -> tuple[Float[Tensor, " count"], Int[Tensor, " count"]]:
    """Each row's log-probability, summed over its supervised tokens, and their number.

    Args:
        logits: scores; half precision is raised to float32 first.
        targets: token ids.
        rows: the row of the batch that each belongs to.
        count: rows of the batch.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).squeeze(0)
    rows = rows.to(scores.device)
    found = -functional.cross_entropy(scores, targets.to(scores.device).squeeze(0), reduction="none")
    return found.new_zeros(count).index_add(0, rows, found), torch.bincount(rows, minlength=count)


def reps_loss(
    steered: Float[Tensor, "2 pairs"],
    nulled: Float[Tensor, "2 pairs"],
    base: Float[Tensor, "2 pairs"],
    tokens: Int[Tensor, "2 pairs"],
) -> Float[Tensor, " pairs"]:
    """-log sigmoid(D+) - log sigmoid(D-) of each pair: steered it prefers one answer, with the edit nulled the other.

    With log-probabilities p of the positive answer and n of the negative one, and |p|, |n| their tokens:
    D+ = max(n_base - p_base, 1) p_steered / |p| - n_steered / |n|, and
    D- = max(p_base - n_base, 1) n_nulled / |n| - p_nulled / |p|. Source: RePS, arXiv 2505.20809, its objective and
    the definition of its scaling factors.

    Args:
        steered: summed log-probabilities of the positive answers, then of the negative ones, under the edit.
        nulled: the same under what takes the edit's direction out, or under the edit the other way round.
        base: the same without an edit.
        tokens: of each answer.
    """
    scale = (base.flip(0) - base).clamp(min=1)
    toward, away = steered / tokens, nulled / tokens
    chosen = scale[0] * toward[0] - toward[1]
    refused = scale[1] * away[1] - away[0]
    return -functional.logsigmoid(chosen) - functional.logsigmoid(refused)
