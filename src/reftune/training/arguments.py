"""Training arguments: transformers' own, with defaults that suit an edit of a few thousand numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available

OBJECTIVES = ("completion", "reps", "reft-r1")

logger = logging.getLogger(__name__)


_Class = TypeVar("_Class", bound=type)


def no_type_check(cls: _Class) -> _Class:
    """Keep the tests' run-time type checks away from a class, by this decorator's name.

    transformers annotates ``num_train_epochs: float`` and takes 3, which strict checkers refuse. The decorator of that
    name in `typing` would also hide the annotations from whatever builds a command line from them.
    """
    return cls


@no_type_check
@dataclass
class ReftTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for ReFT; every other field and its meaning are transformers'.

    The learning rate is ten times and more that of LoRA: a rank-4 edit of one layer has few parameters, and they sit
    where they act. The paper's 9e-4 belongs to edits of all layers (its hyperparameter tables); for a model and rows of
    yours see `reftune.runs.known_settings.learning_rate`. There is no decay, as in the paper.
    """

    learning_rate: float = field(
        default=4e-3,
        metadata={"help": "Peak learning rate: 4e-3 suits edits of one or a few layers, 9e-4 edits of all layers."},
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning rate schedule, from peak to zero."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimiser."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the rows: 'group_by_length' (rows of similar length share a batch, which pads less), "
            "'random', 'sequential'.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Drop columns that the forward does not name, the prompt's end with them."},
    )
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where to log: 'tensorboard', 'wandb', 'none', or a list."}
    )
    logging_steps: float = field(default=5, metadata={"help": "Log the loss every so many optimiser steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too: where the curve starts."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Keep the newest checkpoints up to this number, and the best one."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of initialisation, row order and dropout."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Copy batches to the GPU from pinned memory."}
    )
    supervised_logits_only: bool = field(
        default=True,
        metadata={"help": "Compute logits only where the next token is supervised: the same loss, less work."},
    )

    objective: str = field(
        default="completion",
        metadata={
            "help": "What is minimised: 'completion' (the answer's loss), or on pairs of answers 'reps' or 'reft-r1' "
            "(see reftune.training.objectives).",
            "choices": list(OBJECTIVES),
        },
    )
    factors: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "For 'reps': the strengths of the edit, of which each training step draws one."},
    )

    prefix_reuse: str = field(
        default="auto",
        metadata={
            "help": "Compute what the edit leaves alone once instead of in every step: 'auto' where it is exact and "
            "useful, 'on' (an error where it is not), 'off'.",
            "choices": ["auto", "on", "off"],
        },
    )
    prefix_cache_gib: float | None = field(
        default=None,
        metadata={
            "help": "Memory for prefix reuse in GiB; by default a quarter of what is free. As much again on disk."
        },
    )

    def __post_init__(self) -> None:
        """Validate as transformers does; without TensorBoard installed, say so and go on without it."""
        if self.report_to == "tensorboard" and not is_tensorboard_available():
            logger.warning("TensorBoard is not installed, so nothing is logged to it; pip install tensorboard")
            self.report_to = "none"
        super().__post_init__()
