"""Row order of training, a function of the seed and the epoch alone, so that a resumed run sees the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroupedByEpoch(Sampler[int]):
    """Rows of similar length stand together, so that a batch pads little; the order changes from epoch to epoch.

    transformers' own `LengthGroupedSampler` draws from the global generator, whose state in the middle of an epoch says
    nothing of the order that the epoch began with: resuming there would repeat some rows and leave out others.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one optimiser step, those of all processes.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def row_lengths(dataset: Any, length_column: str) -> list[int] | None:
    """Tokens of every row: the length column where there is one, else counted from ``input_ids``; None without."""
    columns = getattr(dataset, "column_names", None)
    if columns is not None and length_column in columns:
        return [int(length) for length in dataset[length_column]]
    if columns is not None and "input_ids" in columns:
        return [len(ids) for ids in dataset["input_ids"]]
    rows = [dataset[index] for index in range(len(dataset))]
    if rows and all(isinstance(row, dict) and "input_ids" in row for row in rows):
        return [len(row["input_ids"]) for row in rows]
    return None
