"""Options that several commands share: the base model under an adapter, and how answers are written."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL, WRITING = "Model", "Writing"
"""The panels of `--help` that they stand in."""

Model = Annotated[
    str | None, typer.Option(help="Base model; default: the one it was trained on.", rich_help_panel=MODEL)
]
Dtype = Annotated[str | None, typer.Option(help="Data type; default: as trained.", rich_help_panel=MODEL)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: the best there is.", rich_help_panel=MODEL)]

MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=WRITING)]
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token, above 0 samples.", rich_help_panel=WRITING)
]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this share.", rich_help_panel=WRITING)]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1 makes written tokens less likely.", rich_help_panel=WRITING)
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.", rich_help_panel=WRITING)]
SystemPrompt = Annotated[
    str | None, typer.Option(help="System message; default: that of training.", rich_help_panel=WRITING)
]
