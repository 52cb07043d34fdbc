"""Pad tokenised rows into a batch that says where each prompt ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reftune.data.tokenising import IGNORED, REJECTED
from reftune.errors import ReftuneError

_OF_A_ROW = ("input_ids", "labels", "prompt_length")


@dataclass(frozen=True)
class CompletionCollator:
    """Collate rows of `encode_dataset`.

    A batch has `input_ids`, `attention_mask` and `labels`, each Int[Tensor, "batch position"], and
    `prompt_lengths`, Int[Tensor, "batch"]: the number of attended prompt tokens of each row, whatever the padding side.
    Of pairs (`Encoding.pairs`) the negative answers' rows come after all positive ones, in the same order.
    For classification, `labels` is "batch" (int64, or float32 for regression) and `token_type_ids` is padded along.

    Args:
        pad_token_id: the id that fills short rows; its attention mask is 0 and its label -100.
        padding_side: "right" or "left".
        pad_to_multiple_of: round the length of the batch up to a multiple of it.
    """

    pad_token_id: int
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        """Refuse a padding side or multiple that does not exist."""
        if self.padding_side not in ("right", "left"):
            raise ReftuneError(f"padding_side={self.padding_side!r}: use 'right' or 'left'")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ReftuneError(f"pad_to_multiple_of={self.pad_to_multiple_of}: use 1 or more, or None")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch; raises ReftuneError where a row has no tokens or no known prompt end."""
        if REJECTED + "input_ids" in rows[0]:
            rows = [*rows, *({name: row[REJECTED + name] for name in _OF_A_ROW} for row in rows)]
        ids = [list(row["input_ids"]) for row in rows]
        longest = max(map(len, ids))
        multiple = self.pad_to_multiple_of or 1
        length = -(-longest // multiple) * multiple
        masks = [list(row.get("attention_mask") or [1] * len(row["input_ids"])) for row in rows]
        batch = {
            "input_ids": self._pad(ids, self.pad_token_id, length),
            "attention_mask": self._pad(masks, 0, length),
            "prompt_lengths": torch.tensor([_prompt_length(row) for row in rows]),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._pad([list(row["token_type_ids"]) for row in rows], 0, length)
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            if isinstance(labels[0], (int, float)):
                batch["labels"] = torch.tensor(labels)
            else:
                batch["labels"] = self._pad([list(row) for row in labels], IGNORED, length)
        return batch

    def _pad(self, rows: list[list[int]], value: int, length: int) -> Tensor:
        if self.padding_side == "right":
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])
        return torch.tensor([[value] * (length - len(row)) + row for row in rows])


def _prompt_length(row: Mapping[str, Any]) -> int:
    if (known := row.get("prompt_length")) is not None:
        return int(known)
    labels = row.get("labels")
    if labels is None or isinstance(labels, (int, float)):
        return len(row["input_ids"])  # generation and classification: everything is the prompt
    for index, label in enumerate(labels):
        if label != IGNORED:
            return index
    raise ReftuneError("a row has neither 'prompt_length' nor a supervised label, so the end of its prompt is unknown")
