"""pyreft's collators: they pad ``intervention_locations`` and ``subspaces`` along with what transformers' pad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from reftune.pyreft.locations import NOWHERE

MOVED = (
    "Rows are padded on the left: intervention_locations are moved along already, and rows have no padding token of "
    "their own in front. Leave out the lines of a pyreft script that add the padding to them and take 1 away."
)
logger = logging.get_logger(__name__)
OWN = ("intervention_locations", "subspaces", "id")


@dataclass
class ReftDataCollator:
    """Collate with transformers' collator, and ``intervention_locations`` (batch, interventions, positions) beside it.

    Locations are moved along where the inner collator pads on the left.

    Args:
        data_collator: such as ``DataCollatorForSeq2Seq``.
    """

    data_collator: Callable[..., Any]

    def __call__(self, instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch."""
        batch = self.data_collator([_without_own(row) for row in instances])
        return _with_own(batch, instances, getattr(self.data_collator, "tokenizer", None))


@dataclass
class ReftRewardCollator:
    """Collate rows of ``ReftRewardDataset``: each row's chosen and rejected conversation, one after the other.

    Args:
        tokenizer: pads.
        padding: as for ``tokenizer.pad``.
        max_length: likewise.
        pad_to_multiple_of: likewise.
        return_tensors: likewise.
    """

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch, of twice as many rows."""
        rows: list[dict[str, Any]] = []
        for feature in features:
            own = {name: feature[name] for name in OWN if name in feature}
            for which in ("chosen_output", "rejected_output"):
                rows.append({"input_ids": feature[which], "attention_mask": feature[f"{which}_mask"], **own})
        batch = self.tokenizer.pad(
            [_without_own(row) for row in rows],
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=self.return_tensors,
        )
        return _with_own(batch, rows, self.tokenizer)


def _without_own(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if name not in OWN}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in kept.items()}


def _with_own(batch: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """The batch with its rows' own columns, moved along where the tokenizer pads on the left."""
    found: dict[str, Any] = dict(batch)
    length, left = found["input_ids"].shape[1], getattr(tokenizer, "padding_side", "right") == "left"
    shifts = [length - len(row["input_ids"]) if left else 0 for row in rows]
    if "intervention_locations" in rows[0]:
        if left:
            logger.warning_once(MOVED)
        moved = [
            [[place + shift if place >= 0 else NOWHERE for place in one] for one in row["intervention_locations"]]
            for row, shift in zip(rows, shifts, strict=True)
        ]
        found["intervention_locations"] = _filled(moved)
    if "subspaces" in rows[0]:
        found["subspaces"] = _filled([row["subspaces"] for row in rows])
    if "id" in rows[0]:
        found["id"] = torch.tensor([row["id"] for row in rows])
    return found


def _filled(rows: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    width = max(len(one) for row in rows for one in row)
    return torch.tensor([[[*one, *[NOWHERE] * (width - len(one))] for one in row] for row in rows])
