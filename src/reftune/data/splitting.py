"""Split rows into training and evaluation rows, the same way for the same seed."""

import random
from collections.abc import Sequence
from typing import TypeVar

from reftune.errors import ReftuneError

Row = TypeVar("Row")


def split_rows(
    rows: Sequence[Row], *, eval_fraction: float | None = None, eval_rows: Sequence[Row] | None = None, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Return `(training rows, evaluation rows)`, both in their original order.

    Examples of one conversation (equal, non-empty `where`) stay together, so that training sees no evaluated turn.

    Args:
        rows: all rows.
        eval_fraction: share of `rows` to hold out, in [0, 1); at least one row when above 0, and never all of them.
        eval_rows: rows read from an evaluation file, used as they are; not together with `eval_fraction`.
        seed: decides which rows are held out.

    Raises:
        ReftuneError: both are given, the fraction is outside [0, 1), or there is a single row to split.
    """
    if eval_rows is not None:
        if eval_fraction:
            raise ReftuneError(f"eval_fraction={eval_fraction} and an evaluation file are both given: choose one")
        return list(rows), list(eval_rows)
    if not eval_fraction:
        return list(rows), []
    if not 0 < eval_fraction < 1:
        raise ReftuneError(f"eval_fraction={eval_fraction}: give a share of at least 0 and below 1, e.g. 0.1")
    groups: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(getattr(row, "where", "") or index, []).append(index)
    if len(groups) < 2:
        raise ReftuneError(f"eval_fraction={eval_fraction}: {len(groups)} row cannot be split; give an evaluation file")
    count = min(len(groups) - 1, max(1, round(len(groups) * eval_fraction)))
    chosen = random.Random(seed).sample(list(groups.values()), count)
    held_out = {index for indices in chosen for index in indices}
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]
