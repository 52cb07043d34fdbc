"""Rows that are longer than a model's table of positions: told before training, not by an index out of range in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from reftune.errors import ReftuneError
from reftune.models import position_table


def check_row_lengths(model: nn.Module, rows: Any) -> None:
    """Refuse a dataset with a row that the model has no positions for; others than tokenised rows are passed over.

    Raises:
        ReftuneError: naming the row.
    """
    limit = position_table(model)
    if limit is None or "input_ids" not in (getattr(rows, "column_names", None) or ()) or not hasattr(rows, "__len__"):
        return
    for column in [name for name in rows.column_names if name.endswith("input_ids")]:
        for number, ids in enumerate(rows[column], start=1):
            if len(ids) > limit:
                raise ReftuneError(
                    f"row {number} has {len(ids)} tokens, and the model has positions for {limit}: set "
                    f"max_length={limit} or lower"
                )
