"""Training: transformers' Trainer for edits.

Open `trainer.py` and `arguments.py` for the trainer, `loss.py` and `supervised_logits.py` for logits only where
something is learned, `objectives.py` for preferences between two answers, `prompt_ends.py` for where prompts end in a
batch, `checkpoints.py` and `interrupts.py` for resuming, `sharding.py` for several processes, `sampling.py`,
`throughput.py`, `progress.py`, `plots.py` for what their names say, and the room `prefix` for what is computed once. It
must not import `runs`, `inference` or what is built on them.
"""

from reftune.training.arguments import ReftTrainingArguments
from reftune.training.checkpoints import last_complete_checkpoint
from reftune.training.loss import completion_loss
from reftune.training.plots import plot_loss
from reftune.training.prefix.store import PrefixStore
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
