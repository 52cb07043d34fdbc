"""The eight GLUE tasks of the ReFT paper: their columns, classes and metrics, and how their held-out rows are used."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Row = TypeVar("Row")

HUB_NAME = "nyu-mll/glue"
_LARGE, _VALIDATION_ROWS = 2000, 1000


@dataclass(frozen=True)
class GlueTask:
    """One task, as `nyu-mll/glue` on the Hub has it.

    Attributes:
        name: its configuration there.
        columns: the column of the text, and of the second text of a pair.
        labels: class names in the order of their ids; empty for a regression.
        metrics: what is measured (names of `evaluation.classification.METRICS`); the score is their mean.
        validation: its split of held-out rows.
        mismatched: a second such split, from other sources than the training rows (MNLI alone).
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: str = "validation"
    mismatched: str | None = None

    @property
    def source(self) -> str:
        """What `reading.read_rows` takes."""
        return f"{HUB_NAME}:{self.name}"


_ENTAILS = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")

GLUE: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation="validation_matched",
            mismatched="validation_mismatched",
        ),
        GlueTask("sst2", ("sentence",), ("negative", "positive")),
        GlueTask("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        GlueTask("qnli", ("question", "sentence"), _ENTAILS),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        GlueTask("rte", _SENTENCES, _ENTAILS),
        GlueTask("stsb", _SENTENCES, (), ("pearson", "spearman")),
    )
}


def split_held_out(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Return `(validation rows, test rows)`, both in their original order.

    The labels of GLUE's test sets are not public, so the paper (arXiv 2404.03592, its GLUE experiments, after RED) cuts
    the public validation set in two with the seed: one part chooses the checkpoint, the other is the test. Of more than
    2,000 rows, 1,000 choose; of fewer, half. (pyreft's script draws the line at 5,000 rows. No GLUE task lies between:
    STS-B has 1,500 and QNLI 5,463. The rows drawn are not the same ones as there.)

    Args:
        rows: a validation set.
        seed: the run's.
    """
    count = _VALIDATION_ROWS if len(rows) > _LARGE else len(rows) // 2
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [rows[i] for i in sorted(chosen)], [row for i, row in enumerate(rows) if i not in chosen]
