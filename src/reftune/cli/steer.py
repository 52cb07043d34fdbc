"""`reftune steer`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from reftune.cli.flags import with_flags
from reftune.output import terminal
from reftune.runs.recipe_values import read_flags, typed_fields
from reftune.steering.settings import SteerSettings


def steer(
    pairs: Annotated[
        str,
        typer.Argument(
            metavar="PAIRS",
            help="Rows with positive and negative answers to a prompt; or prompts (with two instructions); or texts "
            "with labels; or prompts with completions ('demo': the bundled pirate); or a control vector (.gguf, .pt).",
        ),
    ],
    **flags: Any,
) -> None:
    """Make an adapter without training: the direction in which two sets of answers differ."""
    settings = read_flags(SteerSettings, flags)
    from reftune.steering.report import lines, warnings
    from reftune.steering.run import steer as run

    steered = run(pairs, settings, terminal.console(stderr=True))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in lines(steered.found):
        table.add_row(name, Text(terminal.visible(value)))
    console = terminal.console(highlight=False)
    console.print(table)
    for warning in warnings(steered.found):
        console.print(f"Note: {warning}", markup=False)
    folder = steered.folder
    console.print(
        f"Written: {folder} (steer.json, steer.png). Try: reftune chat {folder}", markup=False, soft_wrap=True
    )


with_flags(steer, typed_fields(SteerSettings))
