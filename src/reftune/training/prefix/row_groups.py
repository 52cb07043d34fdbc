"""Rows of similar length run together, so that little of a forward is padding.

A batch is padded to its longest row, and on prompt-heavy data a third of it is padding. Split into groups by length, it
costs fewer tokens and a few more forwards; the loss, a sum over supervised tokens, does not notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reftune.engine.transformers_names import checkpoints_activations
from reftune.training.loss import IGNORED_LABEL
from reftune.training.supervised_logits import shifted

ONE_MORE_FORWARD = 64
"""What a forward and its backward cost beside their tokens, in tokens: estimated from reading 135M weights twice."""

PLAIN_INPUTS = {"input_ids", "attention_mask", "labels", "prompt_lengths", "intervention_directions"}
"""What a batch of rows alone holds, and which directions of an edit act on each."""


def one_more_forward(model: nn.Module, device: torch.device) -> int | None:
    """What another forward costs in tokens; None where a batch should stay whole.

    An accelerator wants one large forward; processes that train together must run as many forwards as each other; and a
    checkpointed forward should be the only one that awaits its backward.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if device.type != "cpu" or together or checkpoints_activations(model):
        return None
    return ONE_MORE_FORWARD


def length_groups(lengths: Sequence[int], forward_cost: int | None) -> list[list[int]]:
    """Split rows into the groups that cost least: tokens with padding, and ``forward_cost`` for each group.

    Args:
        lengths: tokens of each row.
        forward_cost: tokens that one more group is worth; None: all rows stay together, in their order.
    """
    if forward_cost is None or len(set(lengths)) <= 1:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    best, start = [0.0], [0]  # best[end]: the least cost of the `end` shortest rows, whose last group begins at start
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = [best[begin] + (end - begin) * longest + forward_cost for begin in range(end)]
        best.append(min(costs))
        start.append(costs.index(best[-1]))
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[start[end] : end]))
        end = start[end]
    return groups[::-1]


def plain_groups(inputs: Mapping[str, Any], forward_cost: int | None) -> list[tuple[list[int], Mapping[str, Any]]]:
    """A batch as groups of its rows, each cut after the last token that predicts something.

    Args:
        inputs: what a causal language model takes; a batch that is not rows padded on the right stays whole.
        forward_cost: as in ``length_groups``.

    Returns:
        Of each group, its rows in the batch, and its inputs.
    """
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if not isinstance(labels, Tensor):
        return [([], inputs)]
    whole = [(list(range(len(labels))), inputs)]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or "prompt_lengths" not in inputs or set(inputs) - PLAIN_INPUTS:
        return whole
    kept = mask != 0
    if not bool((kept[:, :-1] >= kept[:, 1:]).all()):
        return whole
    targets = shifted(labels)
    columns = torch.arange(1, targets.shape[1] + 1, device=targets.device)
    lengths = ((targets != IGNORED_LABEL) * columns).amax(dim=1).clamp(min=1).tolist()
    found: list[tuple[list[int], Mapping[str, Any]]] = []
    for rows in length_groups(lengths, forward_cost):
        width = max(lengths[row] for row in rows)
        part: dict[str, Any] = {name: inputs[name][rows] for name in inputs if name != "labels"}
        part |= {name: part[name][:, :width] for name in ("input_ids", "attention_mask")}
        part["shift_labels"] = targets[rows, :width]
        found.append((rows, part))
    return found
