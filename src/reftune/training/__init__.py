"""Training: the trainer, its arguments, loss, checkpoints, progress and plots."""

from reftune.training.arguments import ReftTrainingArguments
from reftune.training.checkpoints import last_complete_checkpoint
from reftune.training.loss import completion_loss
from reftune.training.plots import plot_loss
from reftune.training.prefix_store import PrefixStore
from reftune.training.supervised_logits import supervised_forward
from reftune.training.trainer import ReftTrainer

__all__ = [
    "PrefixStore",
    "ReftTrainer",
    "ReftTrainingArguments",
    "completion_loss",
    "last_complete_checkpoint",
    "plot_loss",
    "supervised_forward",
]
