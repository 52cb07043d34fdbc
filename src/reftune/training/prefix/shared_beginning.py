"""The tokens that every row of the data begins with: a system prompt, a template. They need not be computed per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from reftune.engine.position_grammar import Positions


def shared_beginning(
    rows: Iterable[Mapping[str, Any]], positions: Sequence[Positions], edited: bool = False
) -> Int[Tensor, " tokens"]:
    """The longest beginning that all rows share, up to where their edits tell them apart.

    Args:
        rows: examples with ``input_ids`` and ``prompt_length``; one without gives an empty result.
        positions: the active positions.
        edited: whether edits may lie in it. They then lie at the same tokens in every row, so that the edited hidden
            states are the same too. False: it ends before the first edited token.
    """
    common: list[int] | None = None
    touched: set[int] = set()
    for row in rows:
        ids, length = row.get("input_ids"), row.get("prompt_length")
        if ids is None or length is None:
            return torch.empty(0, dtype=torch.long)
        limit, own_touched = _limit(int(length), len(ids), positions, edited)
        own = [int(token) for token in ids[: limit if common is None else min(limit, len(common))]]
        if common is None:
            common, touched = own, own_touched
        same = next((i for i, (a, b) in enumerate(zip(common, own, strict=False)) if a != b), len(own))
        common = common[: min(same, min(touched ^ own_touched, default=same))]
        touched = {ordinal for ordinal in touched if ordinal < len(common)}
        if not common:
            break
    return torch.tensor(common or [], dtype=torch.long)


def _limit(length: int, total: int, positions: Sequence[Positions], edited: bool) -> tuple[int, set[int]]:
    """How many of a row's tokens may be shared, and which of its tokens are edited."""
    if not edited:
        return first_in_tail(positions, length, total), set()
    return max(length - 1, 0), set().union(*(p.ordinals(length, total) for p in positions))


def first_in_tail(positions: Sequence[Positions], prompt_length: int, total: int) -> int:
    """Where what training changes begins: at the first edited token, and no later than the last prompt token.

    The last prompt token predicts the completion's first, so that it stays even where an edit leaves it alone.

    Args:
        positions: the active positions.
        prompt_length: of the row, in tokens.
        total: tokens of the row.
    """
    return min([max(prompt_length - 1, 0), *(o for p in positions for o in p.ordinals(prompt_length, total))])
