"""reftune: representation finetuning (ReFT) for any Hugging Face model.

Importing it makes PEFT know ReFT; every name below is imported when it is first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reftune import models
    from reftune.adapter.config import ReftConfig
    from reftune.adapter.expression import mixture
    from reftune.adapter.tuner import ReftModel
    from reftune.edits import Edit, available_edits, register_edit
    from reftune.engine.attach import Attachment, attach
    from reftune.engine.position_grammar import Positions, parse_positions
    from reftune.engine.sites import Site, find_sites
    from reftune.errors import ReftuneError
    from reftune.training.arguments import ReftTrainingArguments
    from reftune.training.trainer import ReftTrainer

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
    "mixture",
    # base models
    "models",
    # training
    "ReftTrainer",
    "ReftTrainingArguments",
    # errors
    "ReftuneError",
]

_MODULES = {
    "edits": ("Edit", "available_edits", "register_edit"),
    "engine.position_grammar": ("Positions", "parse_positions"),
    "engine.sites": ("Site", "find_sites"),
    "engine.attach": ("Attachment", "attach"),
    "adapter.config": ("ReftConfig",),
    "adapter.tuner": ("ReftModel",),
    "adapter.expression": ("mixture",),
    "training.trainer": ("ReftTrainer",),
    "training.arguments": ("ReftTrainingArguments",),
    "errors": ("ReftuneError",),
}


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("reftune.models")
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The command line waits: docs/decisions/0010-quick-to-start.md
_STARTED_AS_MODULE = sys.argv[:1] == ["-m"] and "-m reftune " in " ".join(sys.orig_argv) + " "
if "reftune_command" not in sys.modules and not _STARTED_AS_MODULE:
    import reftune.adapter.config  # noqa: F401
