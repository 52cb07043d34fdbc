"""reftune: representation finetuning (ReFT) for any Hugging Face model."""

from reftune import models
from reftune.adapter.config import ReftConfig
from reftune.adapter.tuner import ReftModel
from reftune.edits import Edit, available_edits, register_edit
from reftune.engine.attach import Attachment, attach
from reftune.engine.positions import Positions, parse_positions
from reftune.engine.sites import Site, find_sites
from reftune.errors import ReftuneError
from reftune.training import ReftTrainer, ReftTrainingArguments

__version__ = "0.1.0"

__all__ = [
    # edits
    "Edit",
    "available_edits",
    "register_edit",
    # sites and positions
    "Positions",
    "Site",
    "find_sites",
    "parse_positions",
    # the engine
    "Attachment",
    "attach",
    # the PEFT method
    "ReftConfig",
    "ReftModel",
    # base models
    "models",
    # training
    "ReftTrainer",
    "ReftTrainingArguments",
    # errors
    "ReftuneError",
]
