"""Arguments and options that several commands share; those of a dataclass's fields are made in `flags.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reftune.inference.settings import WRITING, BaseModel, GenerationSettings
from reftune.runs.recipe_values import typed_fields

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder: the --output of `reftune train`.")]
Adapters = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Adapter folder, or several with strengths, as in '0.5*pirate + 0.3*formal - terse'.",
    ),
]
SystemPrompt = Annotated[
    str | None, typer.Option(help="System message; default: that of training.", rich_help_panel=WRITING)
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        help="Arguments of the chat template, as in enable_thinking=false; default: those of training.",
        metavar="NAME=VALUE,...",
        rich_help_panel=WRITING,
    ),
]

BASE_MODEL = typed_fields(BaseModel)
SAMPLED = typed_fields(GenerationSettings, without=("top_k", "no_repeat_ngram"))
