"""How fast training went: tokens, seconds an epoch, memory. Evaluation and saving are not counted as training."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from reftune.training.loss import IGNORED_LABEL


def peak_memory_bytes() -> int:
    """The most memory used so far: of the GPU (allocated tensors) where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Unix alone has it

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest) if sys.platform == "darwin" else int(largest) * 1024


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class ThroughputCallback(TrainerCallback):
    """Counts attended tokens and the seconds that training itself takes; its record survives a resume.

    Several processes count their own tokens and add them up at the ends of epochs and where a record is written.

    Attributes:
        epoch_seconds: of the epochs that are done, in order.
        copies: processes that train on the same rows, which count once.
    """

    def __init__(self) -> None:
        self.epoch_seconds: list[float] = []
        self.copies = 1
        self._elapsed = 0.0  # of the epoch that is running, up to the last stop of the clock
        self._started: float | None = None
        self._tokens = 0
        self._uncounted: Tensor | None = None  # stays on its device, so that counting never waits for the GPU

    def begin(self, record: Mapping[str, Any] | None = None, epoch_is_over: bool = False) -> None:
        """Start from nothing, or take up what a checkpoint recorded.

        Args:
            record: see `record`.
            epoch_is_over: the checkpoint was written at the last step of its epoch, before the epoch was closed.
        """
        record = record or {"tokens": 0, "epoch_seconds": [], "running_epoch": 0.0}
        self._tokens, self._uncounted = int(record["tokens"]), None
        self.epoch_seconds = [float(value) for value in record["epoch_seconds"]]
        self._elapsed, self._started = float(record["running_epoch"]), None
        if epoch_is_over and self._elapsed > 0:
            self.epoch_seconds.append(self._elapsed)
            self._elapsed = 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Add one batch: the tokens that its mask keeps, or all of them; of rows without a label, none."""
        mask, ids, labels = (inputs.get(name) for name in ("attention_mask", "input_ids", "labels"))
        if isinstance(mask, Tensor) and mask.ndim == 2:
            kept = mask.detach().ne(0)
            if isinstance(labels, Tensor) and labels.ndim == 2:
                kept &= labels.ne(IGNORED_LABEL).any(dim=1, keepdim=True)
            kept = kept.sum()
        elif isinstance(ids, Tensor):
            kept = torch.tensor(ids.numel(), device=ids.device)
        else:
            return
        self._uncounted = kept if self._uncounted is None else self._uncounted + kept

    @property
    def tokens(self) -> int:
        """Tokens trained on so far; those that were not added up yet count as if every process had as many."""
        return self._tokens + (
            0 if self._uncounted is None else int(self._uncounted.item()) * (_processes() // self.copies)
        )

    def _add_up(self) -> int:
        if self._uncounted is not None:
            if _processes() > 1:
                dist.all_reduce(self._uncounted)
            self._tokens, self._uncounted = self._tokens + int(self._uncounted.item()) // self.copies, None
        return self._tokens

    @property
    def seconds(self) -> float:
        """Seconds of training so far, the running epoch included."""
        return sum(self.epoch_seconds) + self._running_epoch()

    @property
    def tokens_per_second(self) -> float:
        """Tokens by seconds of training; 0 before it began."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def _running_epoch(self) -> float:
        return self._elapsed + (time.perf_counter() - self._started if self._started is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while the context lasts (evaluation, saving)."""
        if self._started is None:
            yield
            return
        self._elapsed, self._started = self._running_epoch(), None
        try:
            yield
        finally:
            self._started = time.perf_counter()

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "tokens": self._add_up(),
            "epoch_seconds": list(self.epoch_seconds),
            "running_epoch": self._running_epoch(),
        }

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the epoch; reading the count waits for the GPU, so its work belongs to the epoch that queued it."""
        self._add_up()
        self.epoch_seconds.append(self._running_epoch())
        self._elapsed, self._started = 0.0, None
